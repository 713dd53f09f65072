"""One process of Megatron on CPU for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from megatron_completedp.config.cli import run_command
from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.mcore.parallel import (
    ParallelState,
    destroy_parallel,
    initialize_parallel,
)
from megatron_completedp.mcore.platform import Platform, detect_platform
from megatron_completedp.train.__main__ import main

#: The command in this process: config and flags to (exit code, error on stderr without the log).
Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def platform() -> Platform:
    return detect_platform("cpu")


@pytest.fixture(scope="session", autouse=True)
def one_process(platform: Platform) -> Iterator[ParallelState]:
    yield initialize_parallel(platform, ParallelConfig(), timeout_s=60, seed=1234)
    destroy_parallel()


@pytest.fixture
def command(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    def run(config: Path, *flags: str) -> tuple[int, str]:
        destroy_parallel(keep_process_group=True)  # a new process has no groups
        monkeypatch.setattr(sys, "argv", ["train", "--config", str(config), *flags])
        capsys.readouterr()
        code = run_command(main)
        _, mark, message = capsys.readouterr().err.partition("error: ")
        return code, mark + message

    yield run
    destroy_parallel(keep_process_group=True)
    initialize_parallel(platform, ParallelConfig(), timeout_s=60, seed=1234)
