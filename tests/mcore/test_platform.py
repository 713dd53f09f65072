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
        timeout=300,
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
    assert "install transformer-engine[pytorch]" in guarded.stderr


#: What a machine with a CUDA device answers, and starting there.
START_ON_CUDA = """
import torch
torch.cuda.device_count = lambda: 1
torch.cuda.set_device = lambda device: None
from megatron_completedp.mcore.platform import CudaPlatform
CudaPlatform().install()
"""


def test_nothing_starts_on_cuda_beside_a_broken_package(tmp_path: Path) -> None:
    """Whoever installed it wants its kernels: training on without them would be slow, unnoticed."""
    assert run_python(START_ON_CUDA).returncode == 0

    compiled_part_missing = {"transformer_engine/__init__.py": "raise RuntimeError('no core')\n"}
    refused = run_python(
        START_ON_CUDA, PYTHONPATH=with_files(tmp_path / "te", compiled_part_missing)
    )
    assert "LaunchError" in refused.stderr
    assert "no core" in refused.stderr
    assert "install transformer-engine[pytorch]" in refused.stderr
    toolkit = UNUSABLE_APEX["toolkit"]
    refused = run_python(START_ON_CUDA, PYTHONPATH=with_files(tmp_path / "apex", toolkit[0]))
    assert "LaunchError" in refused.stderr
    assert toolkit[1] in refused.stderr


#: A web toolkit's apex, one that today's Python cannot parse, and NVIDIA's without its extensions.
UNUSABLE_APEX = {
    "toolkit": ({"apex/__init__.py": "app = object()\n"}, "PyPI's apex is a web toolkit"),
    "outdated": ({"apex/__init__.py": "print 'hello'\n"}, "PyPI's apex is a web toolkit"),
    "uncompiled": (
        {
            "apex/__init__.py": "",
            "apex/multi_tensor_apply/__init__.py": "multi_tensor_applier = None\n",
        },
        "without its CUDA extensions",
    ),
}
USABLE_APEX = UNUSABLE_APEX["uncompiled"][0] | {
    "apex/optimizers/__init__.py": "FusedAdam = FusedSGD = None\n",
    "amp_C.py": """
def multi_tensor_l2norm(*_):
    raise RuntimeError("needs CUDA")

multi_tensor_scale = multi_tensor_l2norm
""",
}
ASK_APEX = """
import megatron_completedp.mcore
import megatron.core.models.gpt.gpt_layer_specs as specs
from megatron_completedp.mcore.kernel_packages import probe_apex
from megatron_completedp.mcore.optimizer import norm_kernels
from megatron_completedp.mcore.platform import CpuPlatform
print(specs.HAVE_APEX, probe_apex().usable)
print(norm_kernels())
CpuPlatform().install()
print(norm_kernels())
"""


def with_files(folder: Path, files: dict[str, str]) -> str:
    """A search path on which `files` come first."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return f"{folder}{os.pathsep}{ROOT}"


@pytest.mark.parametrize("kind", UNUSABLE_APEX)
def test_an_unusable_apex_is_hidden_and_explained(kind: str, tmp_path: Path) -> None:
    files, reason = UNUSABLE_APEX[kind]
    found = run_python(ASK_APEX, PYTHONPATH=with_files(tmp_path, files))
    assert found.returncode == 0, found.stderr
    have, chosen, _ = found.stdout.splitlines()
    assert have == "False False"
    assert chosen.startswith("torch's operations, because Transformer Engine is not installed and ")
    assert reason in chosen


def test_an_apex_that_megatron_would_choke_on_does_so_without_us(tmp_path: Path) -> None:
    """Negative control: hiding is what makes the import work."""
    path = with_files(tmp_path, UNUSABLE_APEX["outdated"][0])
    bare = run_python("import megatron.core.optimizer", PYTHONPATH=path)
    assert "SyntaxError" in bare.stderr


def test_nvidia_s_apex_is_used_but_not_on_cpu(tmp_path: Path) -> None:
    found = run_python(ASK_APEX, PYTHONPATH=with_files(tmp_path, USABLE_APEX))
    assert found.returncode == 0, found.stderr
    have, chosen, on_cpu = found.stdout.splitlines()
    assert have == "True True"
    assert chosen == "Apex's kernels, because Apex and its CUDA extensions can be imported"
    assert on_cpu.startswith("torch's operations, because the kernels of")
