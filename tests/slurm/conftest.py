"""Data and the undisturbed run that several tests compare with."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, tokenizer and token files of the tiny run."""
    from tests.mcore.train_runs import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long run on two ranks of torchrun alone."""
    from tests.mcore.train_runs import finish, start, write_run
    from tests.slurm.training import LONG, TIMEOUT_S

    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, log = finish(start(write_run(folder, corpus, **LONG), ranks=2), timeout_s=TIMEOUT_S)
    assert code == 0, log
    return folder
