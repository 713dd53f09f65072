"""A PostgreSQL server of its own for a test, from the system's packages, in a temporary folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

#: PostgreSQL refuses to run as root; Debian's package makes this user.
SERVER_USER = "postgres"


def _binaries() -> Path | None:
    """The folder with initdb and pg_ctl; Debian keeps it off the PATH."""
    on_path = shutil.which("initdb")
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    return Path(on_path).parent if on_path else (versions[0].parent if versions else None)


@dataclass
class Server:
    """A server on a port of the loopback interface; everyone may connect."""

    folder: Path
    port: int
    binaries: Path
    _databases: int = 0

    def start(self) -> None:
        """Start it and return when it answers."""
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run("pg_ctl", "-w", "-l", f"{self.folder}/log", "-o", options, "start")

    def stop(self) -> None:
        """Stop it, in the middle of whatever it is asked."""
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test{self._databases}"
        self._databases += 1
        import psycopg

        address = f"{SERVER_USER}@127.0.0.1:{self.port}"
        with psycopg.connect(f"postgresql://{address}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://{address}/{name}"

    def initialize(self) -> None:
        """Make the cluster's files."""
        self._run("initdb", "-U", SERVER_USER, "--auth=trust", "--no-sync")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.binaries / program), "-D", f"{self.folder}/data", *arguments]
        if os.geteuid() == 0:
            become = [f"--reuid={SERVER_USER}", f"--regid={SERVER_USER}", "--init-groups"]
            command = ["setpriv", *become, *command]
        # The server must not hold the test's pipes open.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                command, cwd="/", stdout=output, stderr=output, timeout=60, check=False
            )
            output.seek(0)
            assert done.returncode == 0, output.read().decode()


@contextmanager
def server() -> Iterator[Server]:
    """A running server; skips the test, saying so, where PostgreSQL is not installed."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip(
        "psycopg", reason="psycopg is not installed (pip install 'psycopg[binary]')"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not pytest's folder, which only its owner may enter.
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    if os.geteuid() == 0:
        shutil.chown(folder, SERVER_USER, SERVER_USER)
    found = Server(folder, port, binaries)
    try:
        found.initialize()
        found.start()
        yield found
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            found.stop()
            time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)
