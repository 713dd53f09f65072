"""Points that are enqueued by hand, with Optuna's own means."""

from __future__ import annotations

import re
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from search_samples import facts, queue

from megatron_completedp.search.proposal import propose


def test_a_point_enqueued_by_hand_is_what_it_was_given(tmp_path: Path) -> None:
    one = queue(tmp_path)
    one.study.enqueue_trial({"hyperparams.lr": 0.25})
    with ExitStack() as held:
        taken = one.take(held)
        assert taken is not None
        assert taken.params["hyperparams.lr"] == 0.25
        assert one.study.get_trials()[0].params == taken.params


@pytest.mark.parametrize(
    ("point", "named"),
    [
        ({"hyperparams.lr": 9.0}, r"hyperparams\.lr is 9\.0; expected a log in \["),
        ({"hyperparams.lr": "high"}, r"hyperparams\.lr is high; expected a log in \["),
        ({"hyperparams.lrr": 0.1}, "hyperparams.lrr is no dimension .* mean hyperparams.lr"),
    ],
)
def test_a_point_by_hand_that_cannot_be_trained_is_refused_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, point: dict[str, Any], named: str
) -> None:
    one = queue(tmp_path, trials=2, retries=9)
    one.study.enqueue_trial(point)
    for _ in range(2):  # the second try of the one trial that is left
        with ExitStack() as held:
            assert one.take(held) is not None
    assert re.search(named, caplog.text)
    assert caplog.text.count("enqueued by hand and is refused") == 1
    with ExitStack() as held:
        taken = one.take(held)
        assert taken is not None
        one.complete(taken, facts(3.0))
    states = [trial.state.name for trial in one.study.get_trials()]
    assert states == ["FAIL", "FAIL", "FAIL", "COMPLETE"]
    assert one.finished()
    assert one.given_up(one.study.get_trials()) == [], "nothing was lost"


def test_a_study_goes_on_whose_bad_point_was_already_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = queue(tmp_path, trials=2)
    one.study.enqueue_trial({"hyperparams.lr": 9.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        propose(one.study, one.storage, one.objective.space.distributions())
    with ExitStack() as held:
        taken = one.take(held)
        assert taken is not None
        assert taken.params["hyperparams.lr"] < 9.0
    assert caplog.text.count("enqueued by hand and is refused") == 1
