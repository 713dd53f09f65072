"""Checkpoints of any layout in any other, their generators, background saves, and full disks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")

from tests.dist.harness import Results, run_cases
from tests.mcore.engine_runs import Trace, largest_difference

CASES = "tests.dist.checkpoint_cases"
TWO = ["tp2", "pp2", "dp2", "dp2_sharded"]
FOUR = ["tp2_pp2", "tp2_dp2_sharded"]
RANDOM = ["tp2", "dp2_sharded"]

#: fp32 sums in another order (epsilon 1.2e-7); eight steps stay within ten of them.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Each launch resumes what the one before it has saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPLETEDP_TEST_FOLDER", str(tmp_path_factory.mktemp("checkpoints")))
        one = run_cases(CASES, ["whole_one", "start_one", "start_one_sharded"], processes=1)
        cases = [f"there_{name}" for name in TWO] + [f"random_{name}" for name in RANDOM]
        cases += ["background_dp2_sharded", "full_disk"]
        two = run_cases(CASES, cases, processes=2, timeout_s=300)
        four = run_cases(CASES, [f"there_{name}" for name in FOUR], processes=4, timeout_s=300)
        back = run_cases(CASES, [f"back_{name}" for name in (*TWO, *FOUR)], processes=1)
    return SimpleNamespace(one=one, two=two, four=four, back=back)


@pytest.mark.parametrize("layout", [*TWO, *FOUR])
def test_one_process_to_a_layout_and_back(layout: str, results: SimpleNamespace) -> None:
    start = results.one("start_one_sharded" if "sharded" in layout else "start_one")[0]
    there: Results = results.two if layout in TWO else results.four
    middle = there(f"there_{layout}")
    assert all(trace == middle[0] for trace in middle), "every rank reports the same numbers"
    end = results.back(f"back_{layout}")[0]
    parts = (start, middle[0], end)
    joined = Trace(
        [loss for part in parts for loss in part.losses],
        [norm for part in parts for norm in part.grad_norms],
        end.evaluation,
    )
    worst = largest_difference(joined, results.one("whole_one")[0])
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("layout", RANDOM)
def test_generators_come_back_bit_for_bit(layout: str, results: SimpleNamespace) -> None:
    ranks = results.two(f"random_{layout}")
    for rank in ranks:
        for saved, loaded, fresh in zip(rank["saved"], rank["loaded"], rank["fresh"], strict=True):
            assert torch.equal(saved, loaded)
            assert not torch.equal(saved, fresh), "a generator as seeded would pass, too"
    assert not torch.equal(ranks[0]["saved"][0], ranks[1]["saved"][0])


def test_a_background_save_is_the_snapshot_bit_for_bit(results: SimpleNamespace) -> None:
    for foreground, background in results.two("background_dp2_sharded"):
        assert foreground == background


def test_a_full_disk_fails_on_all_ranks_alike(results: SimpleNamespace) -> None:
    first, second = results.two("full_disk")
    assert first == second
    assert len(first["messages"]) == 6
    for message, limited in zip(first["messages"], (0, 0, 0, 0, 1, 1), strict=True):
        assert "step_00000002 could not be written" in message
        assert f"rank {limited}: " in message
        assert "Make room" in message
        assert "Traceback" not in message
    assert Path(first["resumed"]).name == "step_00000001"
    assert Path(first["again"]).name == "step_00000002"
