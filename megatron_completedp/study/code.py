"""Which code did it: the version, the commit, and a hash of the sources as they are."""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from pathlib import Path

from megatron_completedp import __version__


def code_version() -> str:
    """The code in a line. Two states of an edited checkout differ in the hash alone."""
    return f"{__version__} ({git_commit() or 'installed'}, sources {sources_hash()[:12]})"


@cache
def sources_hash() -> str:
    """SHA-256 over the names and contents of this package's Python files."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(git, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
