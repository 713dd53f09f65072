"""GPUs that `plan` knows, with the figures its estimates use.

Per GPU of the SXM kind. Memory is what the driver reports (nvidia-smi, total), which is more than
the data sheets' 80, 80, 141 and 180 GB; the rest is from NVIDIA's data sheets, in decimal units:

| GPU | memory | memory bandwidth | bf16 dense | NVLink, both directions | source |
| --- | --- | --- | --- | --- | --- |
| A100-80 | 81,920 MiB | 2.039 TB/s | 312 TFLOP/s | 600 GB/s | A100 80GB data sheet |
| H100 | 81,559 MiB | 3.35 TB/s | 989 TFLOP/s | 900 GB/s | H100 data sheet |
| H200 | 143,771 MiB | 4.8 TB/s | 989 TFLOP/s | 900 GB/s | H200 data sheet |
| B200 | 183,359 MiB | 7.7 TB/s | 2250 TFLOP/s | 1800 GB/s | Blackwell data sheet, HGX B200 |

The sheets of H100, H200 and B200 print bf16 with sparsity; dense is half of that. The table below
holds NVLink per direction, half of the figure above. The network between nodes is no property of a
GPU: one 200 Gb/s port per GPU is assumed for A100 and one 400 Gb/s port for the others, as in DGX
systems. Nodes are taken to have 8 GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_completedp.errors import ConfigError

MIB = 2**20

#: GPUs that share NVLink.
GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU: bytes, bytes per second and FLOP per second."""

    name: str
    memory_bytes: float
    memory_bandwidth: float
    """Of its own memory; bounds the optimizer step."""
    bf16_flops: float
    """Dense peak."""
    nvlink_bandwidth: float
    """Inside a node, in one direction."""
    network_bandwidth: float
    """Between nodes, in one direction; an assumption, see the module's text."""


DEVICES = {
    device.name: device
    for device in (
        Device(
            name="A100-80",
            memory_bytes=81_920 * MIB,
            memory_bandwidth=2.039e12,
            bf16_flops=312e12,
            nvlink_bandwidth=300e9,
            network_bandwidth=25e9,
        ),
        Device(
            name="H100",
            memory_bytes=81_559 * MIB,
            memory_bandwidth=3.35e12,
            bf16_flops=989e12,
            nvlink_bandwidth=450e9,
            network_bandwidth=50e9,
        ),
        Device(
            name="H200",
            memory_bytes=143_771 * MIB,
            memory_bandwidth=4.8e12,
            bf16_flops=989e12,
            nvlink_bandwidth=450e9,
            network_bandwidth=50e9,
        ),
        Device(
            name="B200",
            memory_bytes=183_359 * MIB,
            memory_bandwidth=7.7e12,
            bf16_flops=2250e12,
            nvlink_bandwidth=900e9,
            network_bandwidth=50e9,
        ),
    )
}


def find_device(name: str) -> Device:
    """The device called `name` (case does not matter); raises ConfigError with the known names."""
    for known, device in DEVICES.items():
        if known.lower() == name.lower():
            return device
    raise ConfigError(f"--gpu is {name!r}; expected one of {', '.join(DEVICES)}.")
