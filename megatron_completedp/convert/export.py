"""Checkpoint to Hugging Face model: the whole folder, proved before it gets its name."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_completedp.convert.card import write_card
from megatron_completedp.convert.folder import whole_folder
from megatron_completedp.convert.hf import write_hf_weights
from megatron_completedp.convert.hf_config import write_config
from megatron_completedp.convert.mapping import MEGATRON_NAMES
from megatron_completedp.convert.source import open_source
from megatron_completedp.convert.tokenizer_files import write_tokenizer
from megatron_completedp.convert.verify import TOLERANCE, Verification, verify
from megatron_completedp.core.roles import Module
from megatron_completedp.errors import ConversionError
from megatron_completedp.mcore.weights import WeightReader

logger = logging.getLogger(__name__)

VERIFICATION_FILE = "verification.json"


@dataclass(frozen=True, kw_only=True)
class Proof:
    """How an export is verified."""

    text: str | None = None
    """File or folder of held-out text; none means the run's validation data."""
    samples: int = 4
    """Sequences of the model's length."""
    tolerance: float = TOLERANCE
    """Largest difference of logits, in units of the largest where that is above 1."""


def to_hf(
    path: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer_path: str | None = None,
    proof: Proof | None,
) -> Verification | None:
    """Write the checkpoint at `path` as the Hugging Face model `out`.

    `dtype` none keeps that of the checkpoint. Needs `initialize_parallel` in a single process.
    Memory of the conversion: one file of the result and one weight; `proof` needs both models.

    Raises ConversionError when `out` is not empty, when the model cannot be expressed, and when the
    proof fails, CheckpointError for a damaged checkpoint. Whatever happens, `out` is there only
    when it is whole and, with a `proof`, right.
    """
    with whole_folder(out) as folder:
        source = open_source(path)
        tokenizer = source.tokenizer(tokenizer_path)
        reader = WeightReader(source.checkpoint)
        dtype = dtype or reader.dtype(MEGATRON_NAMES[Module.EMBEDDING])
        logger.info("converting %s", source.checkpoint)
        write_hf_weights(
            folder,
            source.shape,
            source.multipliers,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            read=reader.read,
        )
        write_config(folder, source.shape, dtype=dtype, eod=tokenizer.eod)
        write_tokenizer(folder, tokenizer, seq_length=source.shape.seq_length)
        verification = None
        if proof is not None:
            logger.info("verifying")
            verification = verify(
                source,
                folder,
                tokenizer,
                text=proof.text,
                samples=proof.samples,
                tolerance=proof.tolerance,
            )
            if verification.problems:
                raise ConversionError(
                    f"the converted model is not the one in {source.checkpoint}:\n{verification}\n"
                    f"{out} was not written. If only rounding speaks against it, raise --tolerance."
                )
            text = json.dumps(verification.as_json(), indent=1) + "\n"
            (folder / VERIFICATION_FILE).write_text(text, encoding="utf-8")
        write_card(folder, source, verification, name=Path(os.path.abspath(out)).name)
    return verification


def verify_export(
    path: Path, hf_folder: Path, *, tokenizer_path: str | None = None, proof: Proof
) -> Verification:
    """Compare the Hugging Face model in `hf_folder` with the checkpoint at `path`.

    Needs `initialize_parallel` in a single process. Raises as `open_source` and `verify` do; a
    difference is in the result.
    """
    source = open_source(path)
    return verify(
        source,
        hf_folder,
        source.tokenizer(tokenizer_path),
        text=proof.text,
        samples=proof.samples,
        tolerance=proof.tolerance,
    )
