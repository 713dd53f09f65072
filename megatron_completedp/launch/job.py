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


def begin(config: RunConfig, *, job: str, nodes: Sequence[str], ranks: int, tries: int) -> int:
    """Count a start, make its folder of logs; the port for its rendezvous.

    Runs on the first node. Raises ConfigError when the ranks do not divide the run, LaunchError
    when `tries` starts of this job were lost without a new checkpoint or no port is free.
    """
    check_world(config, ranks)
    port = free_port(job)
    attempts = Attempts(Path(config.run_dir))
    attempts.end_lost()
    if attempts.fruitless(job) >= tries:
        raise LaunchError(_out_of_tries(attempts, job, None))
    attempts.begin(job, nodes)
    return port


def end(config: RunConfig, *, job: str, tries: int, exit_code: int) -> Verdict:
    """Count how the start ended, by srun's `exit_code` and what the ranks have left behind."""
    attempts = Attempts(Path(config.run_dir))
    start = attempts.all[-1]
    if exit_code == 0:
        attempts.end("finished")
        return Verdict("done", f"{config.run_dir} is finished")
    if (attempts.run_dir / run_folder.REQUEUE_FILE).exists():
        attempts.end("stopped", "a signal; saved")
        return Verdict(
            "requeue", f"saved at step {attempts.all[-1].ended_step}; the job is queued again"
        )
    failure = first_failure(attempts.logs(), start.nodes)
    reason = str(failure) if failure else f"srun ended with {exit_code}, no rank was reported"
    blamed = None
    if hung(attempts.run_dir, since=start.began_at):
        reason += "; the run hung, see its stacks_rank*.txt"
    elif failure and not failure.of_configuration:
        blamed = failure.node
    attempts.end("failed", reason, blamed)
    if failure and failure.of_configuration:
        log = rank_log(attempts.logs(), failure.rank)
        return Verdict(
            "stop",
            f"error: {reason}: the configuration was refused, which another start would not "
            f"change. Mend it and submit again. {log} ends with\n{last_lines(log)}",
        )
    if attempts.fruitless(job) >= tries:
        return Verdict("stop", _out_of_tries(attempts, job, failure))
    return Verdict("requeue", _goes_on(attempts, job, tries), tuple(attempts.to_exclude(job)))


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


def _goes_on(attempts: Attempts, job: str, tries: int) -> str:
    last, count = attempts.all[-1], attempts.fruitless(job)
    counted = f"{count} of {tries} starts without a new checkpoint" if count else "with progress"
    out = attempts.to_exclude(job)
    without = f", without {', '.join(out)}, which failed twice" if out else ""
    return (
        f"start {len(attempts.all)} failed: {last.reason} ({counted}); the job is queued again "
        f"from step {last.ended_step}{without}. Logs: {attempts.logs()}"
    )


def _out_of_tries(attempts: Attempts, job: str, failure: Failure | None) -> str:
    last, logs = attempts.all[-1], attempts.logs()
    log = rank_log(logs, failure.rank) if failure else node_log(logs, 0)
    step = f"step {last.ended_step}" if last.ended_step else "none was ever written"
    return (
        f"error: {attempts.fruitless(job)} starts of job {job} in a row ended without a new "
        f"checkpoint (newest: {step}), so it is not queued again. The last one: {last.reason}. "
        f"Mend that and submit the run again; it goes on from its newest checkpoint. {log} ends "
        f"with\n{last_lines(log)}"
    )
