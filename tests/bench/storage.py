"""What the study's database costs a trial: `python -m tests.bench.storage`.

Times what a worker does around a trial's training (looking for dead workers, asking, writing every
parameter, entering the result), with a sampler that costs nothing, on a study that has grown to
150 trials of 79 parameters. SQLite in a temporary folder, and PostgreSQL where it is installed.
`cpu` is the worker's own CPU time, which other processes' turns do not lengthen; `wall` the
clock's, with the server's part. The share is that of `wall` in a trial of 14 seconds, as
examples/search has them. The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import optuna
from _pytest.outcomes import Skipped
from optuna.distributions import FloatDistribution

from megatron_completedp.search.objective import Facts, Objective
from megatron_completedp.search.outage import heartbeat
from megatron_completedp.search.queue import Queue
from megatron_completedp.search.settings import DatabaseSettings
from megatron_completedp.search.storage import connect, open_study
from tests import postgres

PARAMETERS, TRIALS = 79, 150
TRIAL_S = 14.0

FACTS = Facts(
    losses=(3.0,),
    diverged=False,
    configs=("trials/0000.yaml",),
    seconds=TRIAL_S,
    steps=100,
    tokens=100_000,
    flops=1e12,
)


def fake_objective() -> Objective:
    """As far as the queue needs it: 79 parameters, and the value of a trial."""
    names = [f"types.module{index}.lr_mult" for index in range(PARAMETERS)]
    floats = {name: FloatDistribution(-2, 2) for name in names}
    space = SimpleNamespace(distributions=lambda: floats)
    fake = SimpleNamespace(
        space=space, value=lambda facts: facts.losses[0], configs=lambda *_, **__: iter(())
    )
    return cast(Objective, fake)


def measure(url: str, out: Path, trials: int = TRIALS) -> list[tuple[float, float]]:
    """Seconds that each trial spent on the study, of CPU and by the clock."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = connect(url, DatabaseSettings(), out)
    queue = Queue(
        study=open_study(storage, "bench", out, identity={}),
        storage=storage,
        sampler=lambda slot: optuna.samplers.RandomSampler(slot),
        objective=fake_objective(),
        out=out,
        trials=trials,
        retries=3,
        worker="bench",
    )
    spent = []
    for number in range(trials):
        start = time.process_time(), time.perf_counter()
        with ExitStack() as held:
            taken = queue.take(held)
            assert taken is not None
            with heartbeat(storage, taken.trial._trial_id):
                pass
            queue.complete(taken, replace(FACTS, losses=(3.0 + number,)))
        spent.append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return spent


def main() -> None:
    """Print a table and, as the last line, the figures as JSON."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        results = {"sqlite": measure(f"sqlite:///{out / 'study.db'}", out)}
    with suppress(Skipped), postgres.server() as server, tempfile.TemporaryDirectory() as folder:
        results["postgresql"] = measure(server.database(), Path(folder))
    print(f"{'database':<12}{'cpu':>8}{'wall':>8}   ms per trial, median of the last 50")
    for name, spent in results.items():
        cpu, wall = (1000 * statistics.median(part) for part in zip(*spent[-50:], strict=True))
        print(f"{name:<12}{cpu:>8.1f}{wall:>8.1f}   {wall / TRIAL_S / 10:.2f} % of {TRIAL_S:g} s")
        figures[f"{name}_ms"] = round(cpu, 1)
        figures[f"{name}_wall_ms"] = round(wall, 1)  # the server's time too
    print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(main())
