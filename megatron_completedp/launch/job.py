"""What a training job asks before and after its ranks run: launch/slurm.sbatch calls these two."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_completedp.config.run import RunConfig, check_world
from megatron_completedp.errors import LaunchError
from megatron_completedp.launch.attempts import Attempts
from megatron_completedp.launch.blame import (
    Failure,
    first_failure,
    hung,
    last_lines,
    node_log,
    rank_log,
)
from megatron_completedp.train import folder as run_folder

#: Ports that are tried from the job's own on.
PORTS = 64
#: Where jobs' own ports start: above the services' and below the system's ephemeral ones.
FIRST_PORT, PORT_RANGE = 20_000, 10_000


@dataclass(frozen=True)
class Verdict:
    """What the job is to do after a start."""

    word: str
    """done, requeue or stop."""
    message: str
    """For the job's log."""
    exclude: tuple[str, ...] = ()
    """Nodes that the next start is to do without."""


def begin(
    config: RunConfig,
    *,
    job: str,
    nodes: Sequence[str],
    ranks: int,
    tries: int,
    running: Sequence[str] = (),
    restarts: int = 0,
) -> int:
    """Count a start, make its folder of logs; the port for its rendezvous.

    Runs on the first node. Raises ConfigError when the ranks do not divide the run; LaunchError
    when `tries` starts of this job were lost without a new checkpoint, when no port is free, when
    one of the `running` jobs is training the run, and when a job that SLURM has queued again
    `restarts` times never started here.
    """
    check_world(config, ranks)
    port = free_port(job)
    attempts = Attempts(Path(config.run_dir))
    _check_alone(attempts, job, running)
    if restarts and all(each.job != job for each in attempts.all):
        raise LaunchError(
            f"job {job} was queued again ({restarts} times), but {attempts.run_dir} has no start "
            "of it; expected the run_dir of its first start. If the YAML was changed since, the "
            "job would train another run than it was submitted for. Submit it anew; what `launch "
            "train` queues keeps a copy of its run and may be followed by any edit."
        )
    attempts.end_lost()
    if attempts.fruitless(job) >= tries:
        raise LaunchError(_out_of_tries(attempts, job, None))
    attempts.begin(job, nodes)
    return port


def end(run_dir: Path, *, job: str, tries: int, exit_code: int, spare: int) -> Verdict:
    """Count how the job's start ended, by srun's `exit_code` and what the ranks left behind.

    A node that failed too often is left out if there is one of the `spare` nodes, which the job
    could have as well, to take its place: otherwise the job would wait for ever. Raises LaunchError
    when the run has no start of the job.
    """
    attempts = Attempts(run_dir)
    number = attempts.newest_of(job)
    start, logs = attempts.all[number - 1], attempts.logs(number)
    if exit_code == 0:
        attempts.end(job, "finished")
        return Verdict("done", f"{run_dir} is finished")
    if (run_dir / run_folder.REQUEUE_FILE).exists():
        ended = attempts.end(job, "stopped", "a signal; saved")
        return Verdict("requeue", f"saved at step {ended.ended_step}; the job is queued again")
    failure = first_failure(logs, start.nodes)
    reason = str(failure) if failure else f"srun ended with {exit_code}, no rank was reported"
    blamed = None
    if hung(run_dir, since=start.began_at):
        reason += "; the run hung, see its stacks_rank*.txt"
    elif failure and not failure.of_configuration and not failure.explained:
        blamed = failure.node
    attempts.end(job, "failed", reason, blamed)
    if failure and failure.of_configuration:
        log = rank_log(logs, failure.rank)
        return Verdict(
            "stop",
            f"error: {reason}: the configuration was refused, which another start would not "
            f"change. Mend it and submit again. {log} ends with\n{last_lines(log)}",
        )
    if attempts.fruitless(job) >= tries:
        return Verdict("stop", _out_of_tries(attempts, job, failure))
    bad = attempts.to_exclude(job)
    out, stay = tuple(bad[:spare]), bad[spare:]
    message = _goes_on(attempts, job, tries)
    if out:
        message += f" It does without {', '.join(out)}, which failed twice."
    if stay:
        message += (
            f" {', '.join(stay)} failed twice but is not left out: there is no other node like it "
            "for this job, which would wait for ever."
        )
    return Verdict("requeue", message, out)


def free_port(job: str) -> int:
    """The job's own port on this machine, or the next free one. Raises LaunchError without any."""
    digits = "".join(filter(str.isdigit, job)) or "0"
    own = FIRST_PORT + int(digits) % PORT_RANGE
    for port in range(own, own + PORTS):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise LaunchError(
        f"ports {own} to {own + PORTS - 1} of {socket.gethostname()} are all taken; the ranks need "
        "one to meet. Look for what holds them (ss -ltnp), or leave the node out: sbatch --exclude."
    )


def _check_alone(attempts: Attempts, job: str, running: Sequence[str]) -> None:
    """Raise LaunchError if another job that still runs is at this run."""
    newest = attempts.all[-1] if attempts.all else None
    if newest and newest.outcome == "running" and newest.job != job and newest.job in running:
        raise LaunchError(
            f"job {newest.job} is training {attempts.run_dir} on {','.join(newest.nodes)}; job "
            f"{job} would write over it. Wait for it or scancel {newest.job}, then submit again, "
            "or give this run a run_dir of its own."
        )


def _goes_on(attempts: Attempts, job: str, tries: int) -> str:
    number, count = attempts.newest_of(job), attempts.fruitless(job)
    last = attempts.all[number - 1]
    counted = f"{count} of {tries} starts without a new checkpoint" if count else "with progress"
    return (
        f"start {number} failed: {last.reason} ({counted}); the job is queued again from step "
        f"{last.ended_step}. Logs: {attempts.logs(number)}."
    )


def _out_of_tries(attempts: Attempts, job: str, failure: Failure | None) -> str:
    number = attempts.newest_of(job)
    last, logs = attempts.all[number - 1], attempts.logs(number)
    log = rank_log(logs, failure.rank) if failure else node_log(logs, 0)
    step = f"step {last.ended_step}" if last.ended_step else "none was ever written"
    return (
        f"error: {attempts.fruitless(job)} starts of job {job} in a row ended without a new "
        f"checkpoint (newest: {step}), so it is not queued again. The last one: {last.reason}. "
        f"Mend that and submit the run again; it goes on from its newest checkpoint. {log} ends "
        f"with\n{last_lines(log)}"
    )
