"""Which rank failed first: the cause and not what followed from it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from launch_samples import REPORT, report

from megatron_completedp.launch.blame import Failure, first_failure, last_lines

NODES = ("n1", "n2", "n3")


def found(logs: Path) -> str | None:
    failure = first_failure(logs, NODES)
    return str(failure) if failure else None


def test_the_node_s_name_comes_from_the_job_and_not_from_the_report(tmp_path: Path) -> None:
    report(tmp_path, node=1, rank=3, code=1, log_ends_at=5.0)
    expected = Failure(rank=3, node="n2", exit_code=1, at=5.0, explained=False)
    assert first_failure(tmp_path, NODES) == expected


@pytest.mark.parametrize(
    ("code", "says", "explained"),
    [
        (1, "error: a.bin does not exist", True),
        (1, "error: 2 of 3 are missing:\n  a\n  b\n[W] process group was not destroyed", True),
        # Negative controls: a defect, or the machine; and a rank that was killed as it left.
        (1, "error: an earlier one\nTraceback (most recent call last):\n  ...\nOSError: x", False),
        (1, "srun: error: n1: task 0: Exited", False),
        (-signal.SIGKILL, "error: a.bin does not exist", False),
    ],
)
def test_an_error_of_ours_is_of_the_run_and_not_of_its_node(
    tmp_path: Path, code: int, says: str, explained: bool
) -> None:
    report(tmp_path, node=0, rank=0, code=code, log_ends_at=1.0, says=says)
    failure = first_failure(tmp_path, NODES)
    assert failure is not None
    assert failure.explained == explained


def test_the_earlier_exception_is_the_cause(tmp_path: Path) -> None:
    report(tmp_path, node=0, rank=0, code=1, log_ends_at=100.4)
    report(tmp_path, node=2, rank=2, code=1, log_ends_at=100.1)
    assert found(tmp_path) == "rank 2 on n3 left with exit code 1"


@pytest.mark.parametrize("code", [-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS])
def test_a_killed_rank_is_the_cause_whatever_the_times_say(tmp_path: Path, code: int) -> None:
    """Its log may have ended long before: it had no chance to write."""
    report(tmp_path, node=0, rank=0, code=1, log_ends_at=100.0)
    report(tmp_path, node=1, rank=1, code=code, log_ends_at=101.0)
    name = signal.Signals(-code).name
    assert found(tmp_path) == f"rank 1 on n2 was ended by {name}"


def test_an_abort_follows_from_another_s_end(tmp_path: Path) -> None:
    """NCCL's watchdog aborts a rank whose peer is gone."""
    report(tmp_path, node=0, rank=0, code=-signal.SIGABRT, log_ends_at=101.0)
    report(tmp_path, node=1, rank=1, code=1, log_ends_at=100.0)
    assert found(tmp_path) == "rank 1 on n2 left with exit code 1"


@pytest.mark.parametrize("code", [75, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM])
def test_a_rank_that_was_asked_to_end_has_not_failed(tmp_path: Path, code: int) -> None:
    report(tmp_path, node=0, rank=0, code=code, log_ends_at=1.0)
    assert found(tmp_path) is None
    report(tmp_path, node=1, rank=1, code=1, log_ends_at=2.0)
    assert found(tmp_path) == "rank 1 on n2 left with exit code 1"


def test_without_logs_nobody_is_blamed(tmp_path: Path) -> None:
    assert found(tmp_path) is None
    (tmp_path / "node_0.log").write_text("DistNetworkError: address already in use\n")
    assert found(tmp_path) is None


def test_a_rank_without_a_log_has_torchrun_s_time(tmp_path: Path) -> None:
    (tmp_path / "node_0.log").write_text(REPORT.format(rank=0, code=1, name=""))
    failure = first_failure(tmp_path, NODES)
    assert failure is not None
    # 2026-11-22 in any time zone.
    assert failure.at == pytest.approx(1_795_340_000, abs=86_400)


def test_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert last_lines(path) == "  (cannot be read: No such file or directory)"
    path.write_text("".join(f"line {number}\n" for number in range(10_000)))
    assert last_lines(path, 2) == "  line 9998\n  line 9999"
