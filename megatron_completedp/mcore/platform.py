"""Where a run computes: CPU with gloo, or CUDA with NCCL, behind one small interface."""

from __future__ import annotations

import os
import resource
import sys
from abc import ABC, abstractmethod
from typing import Literal

import torch

from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore import cpu_shim
from megatron_completedp.mcore.kernel_packages import refuse_broken


class Platform(ABC):
    """The device of this process. `install` comes before anything of Megatron is built."""

    name: str
    """What a config calls it: cpu or cuda."""
    backend: str
    """The torch.distributed backend."""
    device: torch.device
    """Where this process keeps its tensors."""

    @abstractmethod
    def install(self) -> None:
        """Prepare torch and Megatron for this device; calling it again does nothing."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has finished what was launched on it."""

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """Most memory this process has used so far: resident on CPU, allocated on CUDA."""

    @abstractmethod
    def describe(self) -> str:
        """One line for the start-up log."""


class CpuPlatform(Platform):
    """CPU tensors and the gloo backend; one process per rank."""

    name = "cpu"
    backend = "gloo"
    device = torch.device("cpu")

    def install(self) -> None:
        """Teach Megatron-Core to run without CUDA, for the rest of this process."""
        cpu_shim.install()

    def synchronize(self) -> None:
        """Return at once: CPU operations have finished when they return."""

    def peak_memory_bytes(self) -> int:
        """Peak resident set size of this process, in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux reports KiB

    def describe(self) -> str:
        """Threads and torch version."""
        return (
            f"cpu: {torch.get_num_threads()} threads per process, gloo, torch {torch.__version__}"
        )


class CudaPlatform(Platform):
    """One CUDA device per process, chosen by LOCAL_RANK, and the NCCL backend."""

    name = "cuda"
    backend = "nccl"

    def __init__(self) -> None:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        devices = torch.cuda.device_count()
        if local_rank >= devices:
            raise ConfigError(
                f"LOCAL_RANK is {local_rank}, but this machine shows {devices} CUDA device(s) to "
                "the process. Start at most one process per device, or set training.device to cpu."
            )
        self.device = torch.device("cuda", local_rank)

    def install(self) -> None:
        """Make this process's device the current one.

        Raises LaunchError where Transformer Engine or Apex is installed and cannot be used.
        """
        refuse_broken()
        torch.cuda.set_device(self.device)

    def synchronize(self) -> None:
        """Wait for every stream of the device."""
        torch.cuda.synchronize(self.device)

    def peak_memory_bytes(self) -> int:
        """Peak of the memory allocated by torch on the device, in bytes."""
        return torch.cuda.max_memory_allocated(self.device)

    def describe(self) -> str:
        """Device name and memory, CUDA and torch versions."""
        properties = torch.cuda.get_device_properties(self.device)
        return (
            f"{self.device}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, nccl, "
            f"CUDA {torch.version.cuda}, torch {torch.__version__}"
        )


def detect_platform(kind: Literal["auto", "cpu", "cuda"] = "auto") -> Platform:
    """The platform of this process; `auto` takes CUDA where there is a device.

    Raises ConfigError when `cuda` is asked for and no device is visible.
    """
    has_cuda = torch.cuda.is_available()
    if kind == "cuda" and not has_cuda:
        raise ConfigError(
            "training.device is cuda, but torch sees no CUDA device; expected a driver, a visible "
            "device and a CUDA build of torch. Set training.device to cpu or auto."
        )
    if kind == "cpu" or not has_cuda:
        return CpuPlatform()
    return CudaPlatform()
