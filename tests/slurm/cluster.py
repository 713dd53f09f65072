"""A SLURM controller and nodes of this one machine, for tests of launch scripts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
JobRequeue=1
KillWait=60
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    conf: Path

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """The output of a SLURM command; fails the test where it fails."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "SLURM_CONF": str(self.conf), **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def jobs(self) -> dict[str, tuple[str, str]]:
        """State and node of every job by id; an array's tasks are ID_TASK."""
        lines = self.run("squeue", "-h", "-r", "-o", "%i %T %N").splitlines()
        rows = [[*line.split(), ""][:3] for line in lines]
        return {name: (state, node) for name, state, node in rows}


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
        _wait_for(found, nodes)
        yield found
    finally:
        found.run("scontrol", "shutdown")


def _wait_for(found: Cluster, nodes: int) -> None:
    deadline = time.monotonic() + 60
    while found.run("sinfo", "-h", "-t", "idle", "-o", "%D") != str(nodes):
        assert time.monotonic() < deadline, found.run("sinfo")
        time.sleep(0.5)


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
