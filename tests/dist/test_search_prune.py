"""A trial that falls behind the others is stopped early; and what every trial of a search leaves."""

from __future__ import annotations

import json
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

optuna_dashboard = pytest.importorskip("optuna_dashboard")

from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialHeartbeatModel
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import select

from megatron_completedp.search.pruning import LEAST_POOL
from megatron_completedp.train.folder import CHECKPOINTS

from .search_lives import STEPS
from .test_search_kill import finish, settings, start, trials_of

#: Of which a third lies beyond the cliff, where the loss is far above the others'.
TRIALS = 24


def check_dashboard(storage: RDBStorage, trials: list[FrozenTrial]) -> None:
    """optuna-dashboard opens the study as it is, and shows every trial with its parameters."""
    app, status = optuna_dashboard.wsgi(storage), ""

    def begin(line: str, headers: list[tuple[str, str]], error: object = None) -> None:
        nonlocal status
        status = line

    def get(path: str) -> dict[str, Any]:
        request: dict[str, Any] = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": "after=0"}
        request |= {"SERVER_NAME": "here", "SERVER_PORT": "80", "wsgi.url_scheme": "http"}
        request |= {"wsgi.input": BytesIO(), "wsgi.errors": sys.stderr}
        body = b"".join(app(request, begin))
        assert status.startswith("200"), (status, body)
        found: dict[str, Any] = json.loads(body)
        return found

    (summary,) = get("/api/studies")["study_summaries"]
    shown = get(f"/api/studies/{summary['study_id']}")["trials"]
    assert [trial["state"] for trial in shown] == [
        {"COMPLETE": "Complete", "PRUNED": "Pruned"}[trial.state.name] for trial in trials
    ]
    assert [len(trial["params"]) for trial in shown] == [len(trial.params) for trial in trials]


@pytest.mark.parametrize("prune", [True, False])
def test_a_trial_out_of_the_band_is_stopped_where_that_is_asked(
    prune: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough to be looked at before it ends.
    monkeypatch.setenv("SEARCH_STEP_S", "0.1" if prune else "0.02")
    out = tmp_path / "out"
    config = settings(
        tmp_path, trials=TRIALS, sampler="random", sampler_options={}, prune=prune, workers=2
    )
    finish(start(config, out), out)
    trials = trials_of(config, out)
    assert len(trials) == TRIALS
    # Nobody but the trust region runs the start by itself.
    assert set(trials[0].params.values()) == {0.0}
    assert any(trials[1].params.values())
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert bool(pruned) is prune
    for trial in pruned:
        assert trial.number >= LEAST_POOL
        assert trial.user_attrs["steps"] < STEPS
        assert not (out / "trials" / f"{trial.number:04d}" / CHECKPOINTS).exists()
    ended = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(ended) + len(pruned) == TRIALS
    if prune:
        assert all(trial.intermediate_values for trial in ended)
    storage = RDBStorage(f"sqlite:///{out / 'study.db'}")
    check_dashboard(storage, trials)
    with storage.engine.connect() as connection:
        beats = connection.execute(select(TrialHeartbeatModel.trial_id)).scalars().all()
    assert set(beats) == {trial._trial_id for trial in trials}, "every trial gave signs of life"
