"""Early stopping against the band of the finished runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

import optuna
from optuna.trial import FrozenTrial, TrialState

from megatron_completedp.search.progress import line
from megatron_completedp.search.pruning import LEAST_POOL, Pruner, loss_at, pool_at, upper_edge

STEPS = 20


def trial(loss: float, **changes: Any) -> FrozenTrial:
    values: dict[str, Any] = {
        "state": TrialState.COMPLETE,
        "value": loss,
        "intermediate_values": {5: loss, 10: loss, 15: loss},
    }
    return optuna.trial.create_trial(**{**values, **changes})


POOL = [trial(3.0 + 0.01 * number) for number in range(LEAST_POOL)]


def test_the_band_ends_at_tukeys_fence() -> None:
    # Quartiles 1.75 and 5.25 by the exclusive rule of `statistics`, so 5.25 + 1.5 * 3.5.
    assert upper_edge([1, 2, 3, 4, 5, 6]) == pytest.approx(10.5)


def test_the_pool_is_of_trials_that_ended_well() -> None:
    diverged = trial(6.2, user_attrs={"diverged": True})
    pruned = trial(5.0, state=TrialState.PRUNED, value=None)
    assert pool_at([*POOL, diverged, pruned, trial(3.0, intermediate_values={5: 4.0})], 10) == [
        each.value for each in POOL
    ]


def test_the_loss_at_a_step_is_a_mean_over_a_tenth_of_the_run() -> None:
    rows = [{"kind": "train", "step": step, "loss": float(step)} for step in range(1, 11)]
    assert loss_at(rows, 10, STEPS) == 9.5
    assert loss_at(rows, 15, STEPS) is None, "the run is not there yet"
    assert loss_at([{"kind": "eval", "step": 20, "loss": 1.0}], 10, STEPS) is None


def test_a_pruned_trial_is_called_so_and_its_save_goes(tmp_path: Path) -> None:
    pruned = trial(5.0, state=TrialState.PRUNED, value=None, user_attrs={"seconds": 3.0})
    assert line(pruned) == f"trial {pruned.number} pruned  (3 s)"
    save = tmp_path / "checkpoints" / "step_00000005"
    save.mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    Pruner(tmp_path, steps=STEPS, trials=[]).tidy()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def follow(folder: Path, loss: float, trials: list[FrozenTrial]) -> Pruner:
    """A run up to half of its steps, followed for a second."""
    rows = [{"kind": "train", "step": step, "loss": loss} for step in range(1, 11)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    with Pruner(folder, steps=STEPS, trials=trials) as pruner:
        time.sleep(1.0)
    return pruner


def test_a_run_out_of_the_band_is_behind(tmp_path: Path) -> None:
    pruner = follow(tmp_path, 3.5, POOL)
    assert pruner.behind
    assert pruner.losses == {5: 3.5, 10: 3.5}


def test_a_run_within_the_band_goes_on(tmp_path: Path) -> None:
    assert not follow(tmp_path, 3.07, POOL).behind


def test_a_small_pool_has_no_band(tmp_path: Path) -> None:
    assert not follow(tmp_path, 6.0, POOL[1:]).behind
