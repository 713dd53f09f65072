"""One trained run and its right exports, for the tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_completedp.core.tables import Rules
from tests.mcore.convert_runs import convert_config, export, make_text, train


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def config(text: Path) -> Any:
    # Every fold there is: residual multipliers, softmax scale, logit multiplier.
    rules = Rules(parametrization="completep", depth_alpha=0.75)
    return convert_config(text, rules=rules, model={"softmax_scale": 1 / 20})


@pytest.fixture(scope="session")
def run(config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="session")
def good(run: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Right exports, by the dtype of their weights."""
    folder = tmp_path_factory.mktemp("exports")
    for dtype in (torch.float32, torch.bfloat16):
        export(run, text, folder / str(dtype), dtype=dtype)
    return {"fp32": folder / "torch.float32", "bf16": folder / "torch.bfloat16"}


@pytest.fixture
def copy(good: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(good["fp32"], tmp_path / "copy"))
