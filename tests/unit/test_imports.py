"""Holds the dependency direction by reading imports, so that no module needs to be importable."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_completedp

PACKAGE = "megatron_completedp"
ROOT = Path(megatron_completedp.__file__).parent

_PARTS = {"optim", "mcore", "data", "convert", "plan"}
#: What each part may import from the package besides itself and `errors`.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "core": set(),
    "config": {"core"},
    **{part: {"core", "config"} | _PARTS for part in _PARTS},
    # For engines other than Megatron: nothing that trains on Megatron may need it.
    "torch_engine": {"core", "config"} | _PARTS,
    "train": {"core", "config"} | _PARTS,
    "study": {"core", "config", "train"} | _PARTS,
    "check": {"core", "config", "train", "study"} | _PARTS,
    "search": {"core", "config", "train", "study"} | _PARTS,
    "launch": {"core", "config", "train"} | _PARTS,
}
OUTSIDE_PACKAGE = {"tools", "examples", "launch", "tests"}


def imports_of(source: str, package: str) -> Iterator[str]:
    """Dotted modules that `source`, a module of `package`, imports anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
            module = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            # `from megatron_completedp import core` names the part in the alias.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(root: Path) -> list[str]:
    """Imports under the package folder `root` that go against the direction."""
    found = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        part = path.parts[0].removesuffix(".py")
        package = ".".join([PACKAGE, *path.parts[:-1]])
        for name in imports_of(file.read_text(encoding="utf-8"), package):
            problem = _problem(part, name)
            if problem:
                found.append(f"{path}: imports {name}: {problem}")
    return found


def _problem(part: str, name: str) -> str | None:
    top, *below = name.split(".")
    if top == PACKAGE:
        target = below[0] if below else ""
        # Anything else, such as __version__, is the package's own and no part.
        if target in ALLOWED and part in ALLOWED and target not in ALLOWED[part] | {part, "errors"}:
            return f"{part} may not import {target}"
        return None
    if top in OUTSIDE_PACKAGE:
        return "the package imports nothing from the folders around it"
    if top == "megatron" and part != "mcore":
        return "only mcore imports megatron"
    if part in ("core", "errors") and top not in sys.stdlib_module_names:
        return f"{part} is standard library only"
    if part in ("config", "plan", "launch") and top == "torch":
        return f"{part} works without torch"
    return None


def test_imports_follow_the_direction() -> None:
    assert violations(ROOT) == []


def test_every_part_has_a_place_in_the_direction() -> None:
    """A new part must be given its place here, or nothing would hold it."""
    parts = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert parts <= set(ALLOWED)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/a.py", "import yaml"),
        ("core/a.py", "from megatron_completedp.config.run import RunConfig"),
        ("core/a.py", "from megatron_completedp import config"),
        ("core/a.py", "from ..config import run"),
        ("errors.py", "import torch"),
        ("config/a.py", "import torch"),
        ("config/a.py", "def late():\n    from torch import nn"),
        ("plan/a.py", "from megatron.core import parallel_state"),
        ("train/a.py", "import megatron.core"),
        ("optim/a.py", "from megatron_completedp.train import loop"),
        ("train/a.py", "from megatron_completedp.search.space import Space"),
        ("check/a.py", "from megatron_completedp.search.space import Space"),
        ("train/a.py", "from megatron_completedp.torch_engine import param_groups"),
        ("torch_engine/a.py", "from megatron.core import parallel_state"),
        ("data/a.py", "from tools import preprocess_redpajama"),
        ("launch/a.py", "import torch"),
        ("train/a.py", "from megatron_completedp.launch import attempts"),
    ],
)
def test_a_forbidden_import_is_caught(tmp_path: Path, file: str, line: str) -> None:
    _write(tmp_path, file, line)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/a.py", "import math"),
        ("core/a.py", "from . import roles"),
        ("core/a.py", "from ..errors import ConfigError"),
        ("config/a.py", "import yaml"),
        ("mcore/a.py", "from megatron.core import parallel_state"),
        ("search/a.py", "from megatron_completedp.train import loop"),
    ],
)
def test_an_allowed_import_passes(tmp_path: Path, file: str, line: str) -> None:
    _write(tmp_path, file, line)
    assert violations(tmp_path) == []


def _write(root: Path, file: str, text: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
