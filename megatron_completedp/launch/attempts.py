"""The starts of a run by SLURM jobs, in `launch/attempts.json` of its folder.

A start made progress if the run's newest complete checkpoint is a later one at its end than it was
at its beginning. (Complete: it has its name, and files and sizes are those of its manifest. The
contents are compared by the run itself when it resumes.) Everything is counted within one job, of
which SLURM requeues keep the number: who submits a run again starts from nought.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.errors import CheckpointError, LaunchError
from megatron_completedp.mcore.manifest import verify
from megatron_completedp.mcore.store import list_checkpoints, step_of
from megatron_completedp.train import folder as run_folder

ATTEMPTS_FILE = "attempts.json"

#: A node is left out of a job's next start once it was blamed this often.
BLAMES_TO_EXCLUDE = 2

#: finished: the last step; stopped: by a signal, saved, to be queued again; failed: anything else
#: that the job has seen; lost: the job was gone before it could say (a node died, SLURM ended it).
Outcome = Literal["running", "finished", "stopped", "failed", "lost"]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run."""

    job: str
    """SLURM's number."""
    nodes: tuple[str, ...]
    """In the order of node ranks."""
    began_at: float
    """Seconds since 1970."""
    began_step: int
    """Of the newest checkpoint; 0 without one."""
    outcome: Outcome = "running"
    ended_at: float | None = None
    ended_step: int | None = None
    blamed: str | None = None
    """The node whose rank failed first, if it is known."""
    reason: str = ""
    """What ended it, for people."""

    @property
    def fruitless(self) -> bool:
        """It failed before a new checkpoint. A run that was asked to stop did not fail."""
        return self.outcome in ("failed", "lost") and self.began_step >= (self.ended_step or 0)


class Attempts:
    """The starts of the run in `run_dir`, oldest first. One job at a time changes them."""

    def __init__(self, run_dir: Path) -> None:
        """Read them; a file that is no such list raises LaunchError."""
        self.run_dir = run_dir
        self.folder = run_dir / run_folder.LAUNCH
        self._path = self.folder / ATTEMPTS_FILE
        self.all: list[Attempt] = []
        try:
            rows = json.loads(self._path.read_text(encoding="utf-8"))["attempts"]
            self.all = [Attempt(**{**row, "nodes": tuple(row["nodes"])}) for row in rows]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise LaunchError(
                f"{self._path} cannot be read ({error!r}); expected the starts of a run. Move it "
                "away: the run keeps its checkpoints, the count starts from nought."
            ) from error

    def newest_of(self, job: str) -> int:
        """The number of the newest start of `job`, counted from 1. LaunchError without one."""
        for number in range(len(self.all), 0, -1):
            if self.all[number - 1].job == job:
                return number
        raise LaunchError(
            f"{self._path} has no start of job {job}; expected the one that the job began with. "
            "Was the file moved away? Submit the run again: it goes on from its newest checkpoint."
        )

    def logs(self, number: int | None = None) -> Path:
        """The folder with the logs of start `number`, counted from 1; None means the newest."""
        return self.folder / f"start_{number or len(self.all):03d}"

    def begin(self, job: str, nodes: Sequence[str]) -> None:
        """Add a start and make the folder of its logs. One that was left open is lost.

        The run's request for a start is met: one that dies before the run withdraws the request
        itself must not look as if it had saved.
        """
        self.end_lost()
        run_folder.withdraw_requeue(self.run_dir)
        step = newest_step(self.run_dir)
        self.all.append(Attempt(job=job, nodes=tuple(nodes), began_at=time.time(), began_step=step))
        self._write()
        self.logs().mkdir(parents=True, exist_ok=True)

    def end(
        self, job: str, outcome: Outcome, reason: str = "", blamed: str | None = None
    ) -> Attempt:
        """Say how the newest start of `job` ended."""
        number = self.newest_of(job)
        ended = replace(
            self.all[number - 1],
            outcome=outcome,
            ended_at=time.time(),
            ended_step=newest_step(self.run_dir),
            reason=reason,
            blamed=blamed,
        )
        self.all[number - 1] = ended
        self._write()
        return ended

    def end_lost(self) -> None:
        """End a start whose job could not: stopped if the run asked for a requeue, else lost."""
        if self.all and self.all[-1].outcome == "running":
            asked = (self.run_dir / run_folder.REQUEUE_FILE).exists()
            outcome: Outcome = "stopped" if asked else "lost"
            self.end(self.all[-1].job, outcome, "its job ended before it could say why")

    def fruitless(self, job: str) -> int:
        """How many of the newest starts of `job`, in a row, failed before a new checkpoint."""
        count = 0
        for attempt in reversed([each for each in self.all if each.job == job]):
            if not attempt.fruitless:
                break
            count += 1
        return count

    def to_exclude(self, job: str) -> list[str]:
        """Those of its nodes that were blamed for BLAMES_TO_EXCLUDE starts of `job` or more."""
        nodes = self.all[self.newest_of(job) - 1].nodes
        blames = Counter(each.blamed for each in self.all if each.job == job)
        return [node for node in nodes if blames[node] >= BLAMES_TO_EXCLUDE]

    def _write(self) -> None:
        with atomic_write(self._path) as stream:
            content = {"attempts": [asdict(attempt) for attempt in self.all]}
            stream.write(json.dumps(content, indent=1).encode())


def newest_step(run_dir: Path) -> int:
    """The step of the newest complete checkpoint of the run in `run_dir`; 0 without one."""
    for path in reversed(list_checkpoints(run_dir / run_folder.CHECKPOINTS)):
        try:
            verify(path, contents=False)
        except CheckpointError:
            continue
        return step_of(path)
    return 0
