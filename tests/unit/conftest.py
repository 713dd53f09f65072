"""Fixtures that several modules of unit tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from preprocess_runs import arguments, write_sources

from megatron_completedp.data import preprocess


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process that nothing interrupts."""
    out = tmp_path_factory.mktemp("reference") / "out"
    assert preprocess.main(arguments(source, out, "--workers", "1")) == 0
    return out
