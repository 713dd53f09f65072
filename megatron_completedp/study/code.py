"""Which code did it: the version, the commit, and a hash of the sources as they are."""

from __future__ import annotations

import ast
import hashlib
import subprocess
from functools import cache
from pathlib import Path

from megatron_completedp import __version__


def code_version() -> str:
    """The code in a line. Two states of an edited checkout differ in the hash alone."""
    return f"{__version__} ({git_commit() or 'installed'}, sources {sources_hash()[:12]})"


@cache
def sources_hash(module: str | None = None) -> str:
    """SHA-256 over the names and contents of this package's Python files.

    Given a `module`, over those that decide what it does: its own and what they import.
    """
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(imported(package, module) if module else package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def imported(package: Path, module: str) -> set[Path]:
    """The files of `module` and of all that it imports from its package, directly or not.

    `package` is the package's folder. Imports are absolute ones, wherever they stand in a file.
    """
    found: set[Path] = set()
    left = [module]
    while left:
        name = left.pop()
        path = package.parent / f"{name.replace('.', '/')}.py"
        if not name.startswith(f"{package.name}.") or path in found or not path.is_file():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.module:
                left += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


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
