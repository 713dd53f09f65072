"""How a run is doing: its jobs, its progress, when it will have ended, how it last failed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_completedp.config.load import load_config
from megatron_completedp.core.render import text_table
from megatron_completedp.data.jsonl import read_whole_rows
from megatron_completedp.errors import LaunchError
from megatron_completedp.launch import slurm
from megatron_completedp.launch.attempts import Attempts
from megatron_completedp.train import folder as run_folder


def status(run_dir: Path) -> str:
    """The lines that `launch status` prints for one run. Raises LaunchError if there is none."""
    attempts = Attempts(run_dir)
    jobs = slurm.jobs_of(run_dir, attempts.all[-1].job if attempts.all else None)
    if not jobs and not run_dir.is_dir():
        raise LaunchError(
            f"{run_dir} does not exist, and no job waits for it; expected the run_dir of a run "
            "that was started or submitted. A run's YAML says which it is."
        )
    running = any(job.state == "RUNNING" for job in jobs or ())
    rows = [*_progress(run_dir, running), *_jobs(jobs, attempts), *_starts(attempts)]
    return text_table(["run", str(run_dir)], rows, left=2)


def _progress(run_dir: Path, running: bool) -> list[list[str]]:
    """Step, loss and speed of the last metrics, and the time that is left at that speed.

    An end is expected only of a run with a `running` job: who knows when another goes on?
    """
    config_file = run_dir / run_folder.CONFIG_FILE
    metrics = read_whole_rows(run_dir / run_folder.METRICS_FILE)
    trained = [row for row in metrics if row["kind"] == "train"]
    if not config_file.exists() or not trained:
        return [["progress", "no step yet"]]
    steps, last = load_config(config_file).steps, trained[-1]
    progress = (
        f"step {last['step']:,} of {steps:,} ({last['step'] / steps:.1%}), loss "
        f"{last['loss']:.4f}, {last['tokens_per_s']:,.0f} tokens/s"
    )
    seconds = (steps - last["step"]) * last["step_s"]
    if seconds == 0:
        left = ["expected end", "finished"]
    elif running:
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))
        left = ["expected end", f"{end}, after {seconds / 3600:.2f} h of training"]
    else:
        left = ["left", f"{seconds / 3600:.2f} h of training; no job is known to run"]
    return [["progress", progress], left]


def _jobs(queued: Sequence[slurm.Job] | None, attempts: Attempts) -> list[list[str]]:
    if queued is None:
        return [["jobs", "unknown: there is no squeue here, or it did not answer"]]
    if queued:
        return [["job", f"{job.number} {job.state} {job.where}"] for job in queued]
    rows = [["jobs", "none in the queue"]]
    ended = slurm.accounting(attempts.all[-1].job) if attempts.all else None
    return [*rows, ["last job", f"{attempts.all[-1].job} {ended}"]] if ended else rows


def _starts(attempts: Attempts) -> list[list[str]]:
    if not attempts.all:
        return []
    last = attempts.all[-1]
    counts = Counter(attempt.outcome for attempt in attempts.all)
    words = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(last.began_at))
    rows = [
        ["starts", f"{len(attempts.all)}: {words}"],
        ["last start", f"{since} on {','.join(last.nodes)} from step {last.began_step}"],
    ]
    failed = [attempt for attempt in attempts.all if attempt.outcome in ("failed", "lost")]
    if failed:
        rows.append(["last failure", failed[-1].reason])
    return [*rows, ["logs", str(attempts.logs())]]
