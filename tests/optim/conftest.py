"""Chooses where the Triton kernel runs: on the GPU, or interpreted where there is none."""

from __future__ import annotations

import os

import torch

# Triton reads it when a kernel is decorated, so it must stand before any test module is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
