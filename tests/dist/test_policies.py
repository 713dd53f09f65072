"""Policies and stops with two ranks: what one of them meets, both decide alike."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("megatron.core")

from tests.dist.harness import Results, run_cases
from tests.dist.policy_cases import BAD, INTERVAL, STEPS
from tests.mcore.train_runs import make_corpus

SKIPS = ["skip_dp2", "skip_tp2"]
ROLLBACKS = ["rollback_dp2", "rollback_dp2_background"]
#: The same policy where the ranks share moments or stages.
MORE_ROLLBACKS = ["rollback_dp2_sharded_background", "rollback_pp2_background"]
CASES = [*SKIPS, *ROLLBACKS, *MORE_ROLLBACKS, "stop_dp2", "undisturbed_dp2"]
CASES += ["signal_dp2_background"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("policies")
    make_corpus(folder / "corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPLETEDP_TEST_FOLDER", str(folder))
        return run_cases("tests.dist.policy_cases", CASES, processes=2, timeout_s=600)


def alike(results: Results, case: str) -> dict[str, Any]:
    """What both ranks say; weights may differ where each has a part of the model."""
    first, second = results(case)
    without = [{k: v for k, v in rank.items() if k != "weights"} for rank in (first, second)]
    assert without[0] == without[1]
    if "_dp2" in case:
        assert first.get("weights") == second.get("weights"), "copies of one model"
    return first


def checkpoints(*steps: int) -> list[str]:
    return [f"step_{step:08d}" for step in steps]


def test_stop_ends_both_ranks_with_one_message(results: Results) -> None:
    end = alike(results, "stop_dp2")
    (event,) = end["events"]
    assert (event["step"], event["what"], event["policy"]) == (BAD, "nonfinite", "stop")
    assert end["error"] == event["message"]
    assert f"step {BAD}: the gradient norm is inf at a loss of " in end["error"]
    assert end["checkpoints"] == checkpoints(INTERVAL, 2 * INTERVAL)
    assert end["error"].endswith(f"{checkpoints(2 * INTERVAL)[0]}.")


@pytest.mark.parametrize("case", SKIPS)
def test_skip_leaves_the_update_out_on_both_ranks(case: str, results: Results) -> None:
    end = alike(results, case)
    (event,) = end["events"]
    assert (event["step"], event["what"], event["policy"]) == (BAD, "nonfinite", "skip")
    assert len(event["groups"]) == 1
    assert (end["steps"], end["finite"]) == (STEPS, True)
    assert [step for step, _ in end["losses"]] == [s for s in range(1, STEPS + 1) if s != BAD]


@pytest.mark.parametrize("case", [*ROLLBACKS, *MORE_ROLLBACKS])
def test_rollback_takes_both_ranks_back(case: str, results: Results) -> None:
    end = alike(results, case)
    (event,) = end["events"]
    assert (event["step"], event["what"], event["policy"]) == (BAD, "nonfinite", "rollback")
    # With a save in the background, too, it is the newest one that both go back to.
    assert f"{checkpoints(2 * INTERVAL)[0]}." in event["message"]
    assert (end["steps"], end["finite"]) == (STEPS, True)
    assert end["checkpoints"] == checkpoints(INTERVAL, 2 * INTERVAL, BAD, 3 * INTERVAL, STEPS)


def test_where_a_save_is_written_changes_no_number(results: Results) -> None:
    one, other = (alike(results, case) for case in ROLLBACKS)
    assert one["losses"] == other["losses"]
    assert one["weights"] == other["weights"]


def test_a_signal_amid_a_background_save_stops_both_ranks(results: Results) -> None:
    stopped = alike(results, "signal_dp2_background")
    assert stopped["stopped"] == (True, BAD, True)
    assert stopped["checkpoints"] == checkpoints(INTERVAL, 2 * INTERVAL, BAD)
    assert stopped["finished"] == (False, STEPS)
    whole = alike(results, "undisturbed_dp2")
    assert stopped["losses"] == whole["losses"]
    assert stopped["evaluations"] == whole["evaluations"]
