"""Platforms, process groups, and living beside an unusable Transformer Engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.parallel import ParallelState, initialize_parallel
from megatron_completedp.mcore.platform import CpuPlatform, Platform, detect_platform

ROOT = Path(__file__).parents[2]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_auto_takes_what_is_there() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert detect_platform().name == expected
    assert detect_platform("cpu").name == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        detect_platform("cuda")


def test_cpu_platform_reports_itself() -> None:
    platform = CpuPlatform()
    platform.install()
    platform.install()  # idempotent
    platform.synchronize()
    assert platform.backend == "gloo"
    assert "cpu" in platform.describe()
    # At least the 100 MB of torch, less than this machine could hold.
    assert 1e8 < platform.peak_memory_bytes() < 1e12


def test_one_process_needs_no_launcher(one_process: ParallelState) -> None:
    assert one_process == ParallelState(0, 1, 0, 1, 0, 1, 0, 1)


def test_world_size_must_hold_whole_replicas(platform: Platform) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with pytest.raises(ConfigError, match="Start 4 processes"):
        initialize_parallel(platform, parallel, timeout_s=10, seed=0)


def test_random_tracker_forks_a_stream_of_its_own() -> None:
    torch.manual_seed(0)
    untouched = torch.rand(3)
    torch.manual_seed(0)
    with get_cuda_rng_tracker().fork():
        first = torch.rand(3)
    after = torch.rand(3)
    with get_cuda_rng_tracker().fork():
        second = torch.rand(3)
    assert torch.equal(untouched, after)
    assert not torch.equal(first, untouched)
    assert not torch.equal(first, second)


def test_another_layout_in_the_same_process_leaves_no_groups_behind() -> None:
    code = """
import torch.distributed as dist
from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.mcore.parallel import destroy_parallel, initialize_parallel
from megatron_completedp.mcore.platform import CpuPlatform
for _ in range(2):
    initialize_parallel(CpuPlatform(), ParallelConfig(), timeout_s=60, seed=1)
    dist.new_group([0])  # Megatron's optimizer makes such a group and keeps it in no list
    groups = len(dist.distributed_c10d._world.pg_map)
    destroy_parallel(keep_process_group=True)
    print(groups > 1, len(dist.distributed_c10d._world.pg_map), dist.get_world_size())
"""
    done = run_python(code)
    assert done.stdout.split() == ["True", "1", "1"] * 2, done.stderr


def test_an_unusable_transformer_engine_is_hidden(tmp_path: Path) -> None:
    """The package without its compiled part raises RuntimeError, which Megatron lets through."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('compiled part is missing')\n")
    search_path = f"{tmp_path}{os.pathsep}{ROOT}"

    bare = run_python("import megatron.core.extensions.transformer_engine", PYTHONPATH=search_path)
    assert "compiled part is missing" in bare.stderr

    code = """
import logging
logging.basicConfig(level=logging.INFO)
import megatron_completedp.mcore.model
from megatron_completedp.mcore.layer_spec import use_transformer_engine
from megatron_completedp.mcore.platform import CpuPlatform
print(use_transformer_engine(CpuPlatform()))
"""
    guarded = run_python(code, PYTHONPATH=search_path)
    assert guarded.returncode == 0, guarded.stderr
    assert guarded.stdout.strip() == "False"
    assert "Layers: local" in guarded.stderr
    assert "compiled part is missing" in guarded.stderr
