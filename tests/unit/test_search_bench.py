"""The search's overhead: the benchmarks run, and a proposal takes what it may."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from pathlib import Path

import optuna
import pytest

from megatron_completedp.search.samplers import quiet
from megatron_completedp.search.surrogate import synthetic
from tests import postgres
from tests.bench import sampler, storage


def test_the_storage_bench_measures_every_trial(tmp_path: Path) -> None:
    spent = storage.measure(f"sqlite:///{tmp_path / 'study.db'}", tmp_path, trials=2)
    assert len(spent) == 2
    assert all(0 < cpu <= 10 * wall for cpu, wall in spent)


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_the_database_takes_less_than_a_hundredth_of_a_trial(tmp_path: Path, database: str) -> None:
    with ExitStack() as held:
        if database == "sqlite":
            url = f"sqlite:///{tmp_path / 'study.db'}"
        else:
            url = held.enter_context(postgres.server()).database()
        spent = storage.measure(url, tmp_path)
    # The lowest tenth of a grown study's: above it is what else the machine does.
    wall = statistics.quantiles((wall for _, wall in spent[-50:]), n=10)[0]
    assert wall < 0.01 * storage.TRIAL_S, spent[-50:]


@pytest.mark.slow
def test_a_proposal_takes_at_most_5_ms_of_cpu() -> None:
    """With 79 dimensions and 500 trials; the mean with the step down the model, one in about 20."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with quiet():
        trials = sampler.filled(synthetic(79), 500)
        row = sampler.measure("trust_region", synthetic(79), trials, None, rounds=30)
    assert row["proposal"] <= row["mean"] <= 5
    assert row["slowest"] > 2 * row["proposal"], "no step among them"
