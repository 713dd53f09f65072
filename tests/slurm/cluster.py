"""A SLURM controller and nodes of this one machine, for tests of launch scripts."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=60
AuthInfo=cred_expire=15
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
PartitionName=all Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""

#: Every wait for the cluster itself: loaded machines take their time.
PATIENCE_S = 60


@dataclass(frozen=True)
class Cluster:
    """A running cluster. Jobs in the partition `high` preempt those in `all`, the default.

    A job that is queued again waits for AuthInfo's cred_expire, 2 minutes where it is not set.
    """

    conf: Path

    def run(
        self,
        *command: str,
        cwd: Path | None = None,
        timeout_s: float = PATIENCE_S,
        **environment: str,
    ) -> str:
        """The output of a SLURM command; fails the test where it fails."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "SLURM_CONF": str(self.conf), **environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def jobs(self) -> dict[str, tuple[str, str]]:
        """State and node of every job by id; an array's tasks are ID_TASK."""
        lines = self.run("squeue", "-h", "-r", "-o", "%i %T %N").splitlines()
        rows = [[*line.split(), ""][:3] for line in lines]
        return {name: (state, node) for name, state, node in rows}

    def bring_time_limit_near(self, job: str) -> None:
        """Let a running job have 1 to 2 minutes left: SLURM asks it to stop at its next look.

        That is every 30 s, for jobs with a lead (--signal=TERM@<s>) of 2 minutes or more. Its next
        stay has the same limit; set TimeLimit=UNLIMITED while it waits.
        """
        minutes = int(self.run("squeue", "-h", "-j", job, "-o", "%M").split(":")[-2])
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}")


@contextmanager
def cluster(folder: Path, *, nodes: int, cpus: int) -> Iterator[Cluster]:
    """A cluster in `folder`; skips the test, saying so, where SLURM cannot be started."""
    for program in ("slurmctld", "slurmd", "sbatch", "munge"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip(f"{program} is not installed (Debian: apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("starting SLURM's daemons needs root")
    _start_munge()
    host, ports = socket.gethostname(), _free_ports(nodes + 1)
    conf = folder / "slurm.conf"
    lines = [_CONF.format(host=host, folder=folder, port=ports[0])]
    for number, port in enumerate(ports[1:], start=1):
        (folder / f"spool.n{number}").mkdir(parents=True)
        _name_this_machine(f"n{number}")
        lines.append(
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
            "RealMemory=64000\n"
        )
    (folder / "state").mkdir()
    conf.write_text("".join(lines))
    found = Cluster(conf)
    found.run("/usr/sbin/slurmctld", "-f", str(conf))
    try:
        for number in range(1, nodes + 1):
            found.run("/usr/sbin/slurmd", "-N", f"n{number}", "-f", str(conf))
        idle = ("sinfo", "-h", "-t", "idle", "-o", "%D")
        wait_until("all nodes idle", lambda: found.run(*idle) == str(nodes), timeout_s=PATIENCE_S)
        yield found
    finally:
        _stop(found)


def wait_until(what: str, reached: Callable[[], bool], *, timeout_s: float = 300) -> None:
    """Fail the test, saying `what`, unless it is `reached` in time."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, f"after {timeout_s:.0f} s not yet: {what}"
        time.sleep(0.5)


def _stop(found: Cluster) -> None:
    """End jobs and daemons; a daemon that does not leave when asked to is killed."""
    folder = found.conf.parent
    with suppress(AssertionError, subprocess.TimeoutExpired):
        found.run("scancel", "--user=root")
        wait_until("no job", lambda: not found.jobs(), timeout_s=PATIENCE_S / 2)
        found.run("scontrol", "shutdown")
    deadline = time.monotonic() + PATIENCE_S / 2
    for path in folder.glob("slurm*.pid"):
        with suppress(OSError, ValueError):
            pid = int(path.read_text())
            while time.monotonic() < deadline:
                os.kill(pid, 0)
                time.sleep(0.2)
            os.kill(pid, signal.SIGKILL)


def _name_this_machine(node: str) -> None:
    """Ranks find the head node by its name."""
    try:
        socket.gethostbyname(node)
    except OSError:
        with Path("/etc/hosts").open("a") as file:
            file.write(f"127.0.0.1 {node}\n")


def _start_munge() -> None:
    """SLURM's daemons know each other by munge's socket."""
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge")
        command = ["setpriv", "--reuid=munge", "--regid=munge", "--init-groups", "munged"]
        path = f"{os.environ['PATH']}:/usr/sbin"
        subprocess.run(command, check=True, env={**os.environ, "PATH": path})


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
