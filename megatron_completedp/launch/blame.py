"""Which rank of a start failed first, from the reports that torchrun leaves in the nodes' logs.

A rank's death takes the others with it: their collectives break, or torchrun and SLURM end them. So
the first one that failed by itself is looked for:

* Those that were asked to end do not count: exit code 75, SIGTERM, SIGINT, or a second signal.
* One that was killed in a way that nothing here kills a rank before torchrun reports it (SIGKILL,
  as by the kernel when memory runs out, SIGSEGV, SIGBUS, SIGFPE or SIGILL) comes before any that
  left with an exception: exceptions follow from such a death, not the other way round.
* Of those that remain, the one whose log ends first. torchrun's own times are whole seconds, in
  which a broken connection brings every rank down.

Its node is blamed, unless its log ends with an error of ours, or the watchdog ended the rank. Such
an error (a missing file, a run that diverged, a refused configuration) is of the run, and rank 0
reports it for all. In a hang, all ranks wait, and the first to say so need not be the cause.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megatron_completedp.errors import REQUEUE_EXIT_CODE, CompletedPError, ConfigError

#: Deaths that other ranks' ends do not cause. SIGABRT is not one: NCCL aborts when a peer is gone.
OWN_SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)

_ASKED_TO_END = (REQUEUE_EXIT_CODE, -signal.SIGTERM, -signal.SIGINT)
_SECOND_SIGNAL = (128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGUSR1)

_REPORT = re.compile(
    r"time +: (?P<time>\S+)\n *host +: .*\n *rank +: (?P<rank>\d+) \(.*\n"
    r" *exitcode +: (?P<code>-?\d+) \("
)


@dataclass(frozen=True)
class Failure:
    """A rank that ended with an error, as torchrun reported it."""

    rank: int
    node: str
    exit_code: int
    """Negative for a signal."""
    at: float
    """When its log ended, seconds since 1970."""
    explained: bool
    """Whether its log ends with an error of ours, which is of the run and not of the node."""

    @property
    def by_own_signal(self) -> bool:
        """Whether it was killed in a way that the end of another rank does not bring about."""
        return -self.exit_code in OWN_SIGNALS

    @property
    def of_configuration(self) -> bool:
        """Whether it refused its configuration, which no other start will mend."""
        return self.exit_code == ConfigError.exit_code

    def __str__(self) -> str:
        """Rank, node and end in a clause."""
        end = f"left with exit code {self.exit_code}"
        if self.exit_code < 0:
            end = f"was ended by {signal.Signals(-self.exit_code).name}"
        return f"rank {self.rank} on {self.node} {end}"


def rank_log(logs: Path, rank: int) -> Path:
    """Where launch/rank.sh writes the output of a rank."""
    return logs / f"rank_{rank}.log"


def node_log(logs: Path, index: int) -> Path:
    """Where launch/slurm.sbatch writes the output of torchrun on node number `index`."""
    return logs / f"node_{index}.log"


def first_failure(logs: Path, nodes: Sequence[str]) -> Failure | None:
    """The rank of a start on `nodes` that failed first by itself; None where none is reported."""
    ignored = (*_ASKED_TO_END, *_SECOND_SIGNAL)
    found = [each for each in _failures(logs, nodes) if each.exit_code not in ignored]
    return min(found, key=lambda each: (not each.by_own_signal, each.at), default=None)


def hung(run_dir: Path, *, since: float) -> bool:
    """Whether a watchdog has left stacks in the run's folder since that time."""
    return any(path.stat().st_mtime >= since for path in run_dir.glob("stacks_rank*.txt"))


def last_lines(path: Path, count: int = 15) -> str:
    """The end of a log, indented; a note where there is none."""
    try:
        lines = _tail(path)[-count:]
    except OSError as error:
        lines = [f"(cannot be read: {error.strerror})"]
    return "\n".join(f"  {line}" for line in lines)


def _tail(path: Path) -> list[str]:
    """The lines of the last 8 KiB."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 8192, 0))
        return file.read().decode(errors="replace").splitlines()


def _ends_with_own_error(log: Path) -> bool:
    """Whether the last error in a log is one of ours. Libraries may warn after it, at exit."""
    for line in reversed(_tail(log)):
        if line.startswith(("error: ", "Traceback ")):
            return line.startswith("error: ")
    return False


def _failures(logs: Path, nodes: Sequence[str]) -> Iterator[Failure]:
    """Every rank in torchrun's reports, some of them twice."""
    for index, node in enumerate(nodes):
        path = node_log(logs, index)
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for match in _REPORT.finditer(text):
            log = rank_log(logs, int(match["rank"]))
            # A rank that was killed before it wrote anything has torchrun's whole seconds alone.
            whole = datetime.strptime(match["time"], "%Y-%m-%d_%H:%M:%S").timestamp()
            at = log.stat().st_mtime if log.exists() else whole
            code = int(match["code"])
            ours = code in (CompletedPError.exit_code, ConfigError.exit_code)
            explained = ours and log.exists() and _ends_with_own_error(log)
            yield Failure(int(match["rank"]), node, code, at, explained)
