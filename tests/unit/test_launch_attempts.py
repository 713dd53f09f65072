"""Starts of a run: what counts as progress, what ends the tries, which nodes are left out."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from launch_samples import report, write_checkpoint, write_config

from megatron_completedp.config.load import load_config
from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import LaunchError
from megatron_completedp.launch import job
from megatron_completedp.launch.attempts import Attempts, newest_step
from megatron_completedp.train import folder as run_folder

NODES = ("n1", "n2")
TRIES = 3


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(write_config(tmp_path))


def start(config: RunConfig, number: str = "7", **known: Any) -> Path:
    """Begin a start of job `number`; the folder of its logs."""
    job.begin(config, job=number, nodes=NODES, ranks=2, tries=TRIES, **known)
    return Attempts(Path(config.run_dir)).logs()


def end(config: RunConfig, code: int = 1, number: str = "7", spare: int = 1) -> job.Verdict:
    return job.end(Path(config.run_dir), job=number, tries=TRIES, exit_code=code, spare=spare)


def fail(
    config: RunConfig,
    *,
    rank: int,
    code: int = 1,
    number: str = "7",
    saved: int | None = None,
    spare: int = 1,
    says: str = "",
) -> job.Verdict:
    """A start in which `rank`, on the node of its number, fails alone, after it `saved`."""
    logs = start(config, number)
    if saved is not None:
        write_checkpoint(Path(config.run_dir), saved)
    report(logs, node=rank, rank=rank, code=code, log_ends_at=1.0, says=says)
    return end(config, number=number, spare=spare)


def test_the_newest_checkpoint_is_one_whose_files_are_there(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    write_checkpoint(tmp_path, 10)
    newest = write_checkpoint(tmp_path, 20)
    assert newest_step(tmp_path) == 20
    (newest / "weights").write_text("torn")
    assert newest_step(tmp_path) == 10


def test_a_finished_run_is_done(config: RunConfig) -> None:
    start(config)
    assert end(config, code=0).word == "done"
    assert Attempts(Path(config.run_dir)).all[-1].outcome == "finished"


def test_the_launcher_s_files_do_not_keep_a_new_run_out_of_its_folder(config: RunConfig) -> None:
    start(config)
    assert run_folder.claim(config) == Path(config.run_dir)
    # Negative control: anything else does.
    (Path(config.run_dir) / "notes.txt").touch()
    with pytest.raises(Exception, match="nothing in it is overwritten"):
        run_folder.claim(config)


def test_starts_without_a_new_checkpoint_end_after_so_many(config: RunConfig) -> None:
    assert [fail(config, rank=0).word for _ in range(TRIES)] == ["requeue", "requeue", "stop"]
    message = f"{Attempts(Path(config.run_dir)).all[-1].reason}"
    assert message == "rank 0 on n1 left with exit code 1"


def test_the_last_message_says_what_to_look_at(config: RunConfig) -> None:
    write_checkpoint(Path(config.run_dir), 5)
    for _ in range(TRIES):
        verdict = fail(config, rank=1)
    for part in (
        "3 starts of job 7 in a row ended without a new checkpoint (newest: step 5)",
        "rank 1 on n2 left with exit code 1",
        "start_003/rank_1.log ends with\n  first line\n  last words of rank 1",
        "submit the run again",
    ):
        assert part in verdict.message


def test_a_new_checkpoint_starts_the_count_anew(config: RunConfig) -> None:
    for step in range(1, 2 * TRIES):
        assert fail(config, rank=0, saved=step).word == "requeue"


def test_a_job_submitted_anew_has_all_its_tries(config: RunConfig) -> None:
    for _ in range(TRIES):
        fail(config, rank=0)
    with pytest.raises(LaunchError, match="3 starts of job 7"):
        start(config)
    assert fail(config, rank=0, number="8").word == "requeue"


def test_a_stop_by_a_signal_is_no_failure(config: RunConfig) -> None:
    for _ in range(2 * TRIES):
        start(config)
        run_folder.ask_for_requeue(Path(config.run_dir), "stopped")
        assert end(config).word == "requeue"


def test_a_start_that_dies_before_it_trains_has_not_saved(config: RunConfig) -> None:
    """The request of the start before it must not count as its own, or it would go on for ever."""
    start(config)
    run_folder.ask_for_requeue(Path(config.run_dir), "stopped")
    assert end(config).word == "requeue"
    assert [fail(config, rank=0).word for _ in range(TRIES)] == ["requeue", "requeue", "stop"]


@pytest.mark.parametrize("asked", [True, False])
def test_a_start_whose_job_vanished_is_lost_unless_it_had_saved(
    config: RunConfig, asked: bool
) -> None:
    """A node that died takes the script along: the next start says how the last one ended."""
    for _ in range(TRIES):
        start(config)
    if asked:
        run_folder.ask_for_requeue(Path(config.run_dir), "stopped")
        start(config)
        assert Attempts(Path(config.run_dir)).all[-2].outcome == "stopped"
    else:
        with pytest.raises(LaunchError, match="its job ended before it could say why"):
            start(config)
        assert Attempts(Path(config.run_dir)).all[-1].outcome == "lost"


def test_a_refused_configuration_stops_at_once(config: RunConfig) -> None:
    verdict = fail(config, rank=1, code=2)
    assert verdict.word == "stop"
    assert "the configuration was refused" in verdict.message
    assert "last words of rank 1" in verdict.message


def test_a_node_that_failed_twice_is_left_out(config: RunConfig) -> None:
    for step, rank in enumerate((1, 0), start=1):
        assert fail(config, rank=rank, saved=step).exclude == ()
    verdict = fail(config, rank=1, saved=3)
    assert verdict.exclude == ("n2",)
    assert "does without n2, which failed twice" in verdict.message
    # Another job of the run does not inherit the blame: the node may have been mended.
    assert fail(config, rank=1, number="8").exclude == ()


def test_an_error_that_the_run_explains_itself_blames_no_node(config: RunConfig) -> None:
    """Rank 0 reports what all ranks share; its node is no worse than the others."""
    for step in range(1, 5):
        verdict = fail(config, rank=0, saved=step, says="error: a.bin does not exist")
        assert verdict.word == "requeue"
        assert verdict.exclude == ()


def test_no_node_is_left_out_where_none_could_take_its_place(config: RunConfig) -> None:
    """A job that needs more nodes than it may have waits for ever, and never says why."""
    assert [fail(config, rank=0, spare=0).word for _ in range(TRIES)] == [
        "requeue", "requeue", "stop"
    ]  # fmt: skip
    fail(config, rank=0, number="8", spare=0)
    verdict = fail(config, rank=0, number="8", spare=0)
    assert verdict.exclude == ()
    assert "n1 failed twice but is not left out" in verdict.message
    # With one to spare, one of two is left out.
    for rank, step in ((0, 1), (1, 2), (0, 3)):
        fail(config, rank=rank, number="9", saved=step, spare=0)
    verdict = fail(config, rank=1, number="9", saved=4, spare=1)
    assert verdict.exclude == ("n1",)
    assert "does without n1" in verdict.message
    assert "n2 failed twice but is not left out" in verdict.message


def test_a_run_that_another_job_trains_is_left_to_it(config: RunConfig) -> None:
    start(config, "7")
    run_folder.ask_for_requeue(Path(config.run_dir), "stopped")
    with pytest.raises(LaunchError, match=r"job 7 is training .* scancel 7"):
        start(config, "8", running=("7", "8"))
    # Nothing was changed under it: neither its start nor its request.
    assert [each.outcome for each in Attempts(Path(config.run_dir)).all] == ["running"]
    assert end(config, number="7").word == "requeue"
    # Negative controls: one that has said how it ended, one that is gone, and the job itself.
    start(config, "8", running=("7", "8"))
    start(config, "9", running=("9",))
    start(config, "9", running=("9",))


def test_an_end_is_written_to_the_job_s_own_start(config: RunConfig) -> None:
    """Where squeue did not answer, two jobs may have begun."""
    logs = start(config, "7")
    start(config, "8")
    report(logs, node=1, rank=1, code=-9, log_ends_at=1.0)
    verdict = end(config, number="7")
    assert "start 1 failed: rank 1 on n2 was ended by SIGKILL" in verdict.message
    assert [each.outcome for each in Attempts(Path(config.run_dir)).all] == ["failed", "running"]
    with pytest.raises(LaunchError, match="no start of job 9"):
        end(config, number="9")


def test_a_job_that_was_queued_again_trains_what_it_began(config: RunConfig) -> None:
    """Its YAML may name another run by now: that of another job, in the folder of that job."""
    start(config, "8")
    with pytest.raises(LaunchError, match=r"job 7 was queued again .* has no start of it"):
        start(config, "7", restarts=1)
    assert [each.job for each in Attempts(Path(config.run_dir)).all] == ["8"]
    # Negative controls: its first start, and one after that.
    start(config, "7")
    start(config, "7", restarts=1)


def test_a_hang_blames_no_node(config: RunConfig) -> None:
    stacks = Path(config.run_dir) / "stacks_rank1.txt"
    stacks.parent.mkdir()
    later = time.time() + 60
    for step in range(1, 4):
        stacks.write_text("stacks")
        os.utime(stacks, (later, later))
        verdict = fail(config, rank=1, saved=step)
        assert verdict.exclude == ()
        assert "stacks_rank*.txt" in verdict.message
    # Negative control: stacks of an earlier start.
    os.utime(stacks, (1.0, 1.0))
    fail(config, rank=1, saved=4)
    assert fail(config, rank=1, saved=5).exclude == ("n2",)


def test_a_count_that_cannot_be_read_is_named(config: RunConfig) -> None:
    start(config)
    (Path(config.run_dir) / "launch" / "attempts.json").write_text('{"attempts": 3}')
    with pytest.raises(LaunchError, match=r"attempts.json cannot be read.*Move it away"):
        start(config)
