"""Time of a proposal, in a study of 500 trials over 79 parameters.

    python tests/bench/sampler.py [--trials 500] [--dimensions 79] [--rounds 50] [--others]

A proposal is what the sampler does for a new trial: read the study, decide, draw the point and note
what it runs. `storage` is what Optuna does around it: create the trial, write each parameter, write
the value. Both on the storage in memory and on SQLite in a temporary folder, which takes minutes to
fill. Times are the median over rounds of the process's own CPU seconds, which leave out other
processes' turns; `mean` has the steps down the linear model in it, one in about 20 proposals, and
`wall` is the clock's. --others adds the other samplers' proposals in memory, of
which gp and turbo take seconds; random draws while the parameters are written.

The last line is one JSON object: ms is the proposal in memory, mean_ms the mean and slowest_ms the
slowest of them; sqlite_ms the same as ms on SQLite; storage_ms and sqlite_storage_ms the rest of a
trial's overhead; sqlite_wall_ms a whole trial there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import optuna
from optuna.trial import create_trial

from megatron_completedp.search.samplers import make_sampler, quiet
from megatron_completedp.search.surrogate import Surrogate, synthetic

OTHERS = ("random", "qmc", "tpe", "cmaes", "gp", "turbo")


def kinds(surrogate: Surrogate) -> dict[str, str]:
    """Seven, as many as the search of a model has."""
    return {name: str(index % 7) for index, name in enumerate(surrogate.space)}


def filled(surrogate: Surrogate, trials: int) -> list[optuna.trial.FrozenTrial]:
    """A trust-region study of `trials` trials, as it came about in memory."""
    sampler = make_sampler("trust_region", seed=0, space=surrogate.space, kinds=kinds(surrogate))
    study = optuna.create_study(sampler=sampler)
    noise = np.random.default_rng(0)
    for _ in range(trials):
        trial = study.ask({**surrogate.space})
        study.tell(trial, surrogate.observe(trial.params, noise))
    return study.trials


def measure(
    name: str,
    surrogate: Surrogate,
    trials: list[optuna.trial.FrozenTrial],
    storage: str | None,
    rounds: int,
) -> Mapping[str, float]:
    """Median milliseconds of the proposal, of the storage around it, and of both by the clock."""
    sampler = make_sampler(name, seed=0, space=surrogate.space, kinds=kinds(surrogate))
    study = optuna.create_study(sampler=sampler, storage=storage)
    study.add_trials(
        [
            create_trial(
                params=trial.params,
                distributions=trial.distributions,
                system_attrs=trial.system_attrs,
                user_attrs=trial.user_attrs,
                value=trial.value,
            )
            for trial in trials
        ]
    )
    noise = np.random.default_rng(1)
    times: list[tuple[float, float, float]] = []
    for _ in range(rounds + 1):
        wall, start = time.perf_counter(), time.process_time()
        trial = study.ask()
        asked = time.process_time()
        # Optuna asks the sampler when the first parameter is suggested.
        assert trial.relative_params is not None
        proposed = time.process_time()
        for parameter, distribution in surrogate.space.items():
            trial._suggest(parameter, distribution)
        study.tell(trial, surrogate.observe(trial.params, noise))
        end = time.process_time()
        rest = asked - start + end - proposed
        times.append((proposed - asked, rest, time.perf_counter() - wall))
    # The first reads the whole study, as a worker does once when it starts.
    proposals, storage_times, walls = zip(*times[1:], strict=True)
    return {
        "proposal": 1e3 * statistics.median(proposals),
        "mean": 1e3 * statistics.fmean(proposals),
        "slowest": 1e3 * max(proposals),
        "storage": 1e3 * statistics.median(storage_times),
        "wall": 1e3 * statistics.median(walls),
    }


def main() -> None:
    """Print the table and, last, the figures as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--dimensions", type=int, default=79)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--others", action="store_true", help="the other samplers as well")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    surrogate = synthetic(args.dimensions)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        trials = filled(surrogate, args.trials)
        print(f"{args.dimensions} parameters, {args.trials} trials, {args.rounds} rounds, ms")
        print(
            f"{'sampler':<14}{'storage':<10}{'proposal':>10}{'mean':>10}{'slowest':>10}"
            f"{'storage':>10}{'wall':>10}"
        )
        rows = {}
        for kind, url in (("memory", None), ("sqlite", f"sqlite:///{folder}/study.db")):
            rows[kind] = measure("trust_region", surrogate, trials, url, args.rounds)
            _print("trust_region", kind, rows[kind])
        for name in OTHERS if args.others else ():
            _print(name, "memory", measure(name, surrogate, trials, None, 3))
    memory, sqlite = rows["memory"], rows["sqlite"]
    result = {
        "ms": memory["proposal"],
        "mean_ms": memory["mean"],
        "slowest_ms": memory["slowest"],
        "storage_ms": memory["storage"],
        "sqlite_ms": sqlite["proposal"],
        "sqlite_storage_ms": sqlite["storage"],
        "sqlite_wall_ms": sqlite["wall"],
    }
    print(json.dumps({name: round(value, 2) for name, value in result.items()}))


def _print(name: str, kind: str, row: Mapping[str, float]) -> None:
    print(
        f"{name:<14}{kind:<10}" + "".join(f"{value:>10.2f}" for value in row.values()), flush=True
    )


if __name__ == "__main__":
    main()
