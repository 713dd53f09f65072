"""`python tools/convert_checkpoint.py {to-hf,from-hf,verify}`."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import tyro

from megatron_completedp.config.cli import run_command
from megatron_completedp.errors import ConversionError

PROG = "python tools/convert_checkpoint.py"
DESCRIPTION = """\
Checkpoints to Hugging Face models and back, on this machine's CPU, without torchrun. Checkpoints of
any layout are read. SwiGLU models become Qwen3ForCausalLM, GELU models ApertusForCausalLM, which
plain transformers loads. Needs the extra `hf` (pip install 'megatron_completedp[hf]').

Examples:
  python tools/convert_checkpoint.py to-hf runs/target --out exports/target
  python tools/convert_checkpoint.py verify runs/target exports/target --text held_out.jsonl
  python tools/convert_checkpoint.py from-hf exports/target --out runs/target_again
"""


def to_hf(
    checkpoint: tyro.conf.Positional[Path],
    out: Path,
    dtype: Literal["same", "fp32", "bf16"] = "same",
    max_shard_gb: float = 5.0,
    tokenizer: str | None = None,
    no_verify: bool = False,
    text: str | None = None,
    samples: int = 4,
    tolerance: float = 1e-5,
) -> int:
    """Write a checkpoint as a Hugging Face model, and prove that it is the same model.

    Example: python tools/convert_checkpoint.py to-hf runs/target --out exports/target

    Args:
        checkpoint: A run folder (its newest checkpoint), or a folder step_<n>.
        out: Folder of the model. It appears when it is whole and verified.
        dtype: Of the weights; same is the checkpoint's.
        max_shard_gb: Largest safetensors file, in 10^9 bytes; one tensor at least.
        tokenizer: Tokenizer file; none means the one in the run's config.
        no_verify: Leave out the proof, which needs memory for both models in fp32.
        text: Held-out text: a .txt or .jsonl, or a folder of them; none means the validation data.
        samples: Sequences of the model's length to compare the models on.
        tolerance: Largest difference of logits, in units of the largest where that is above 1.
    """
    import torch

    from megatron_completedp.convert import export

    if not 0 < max_shard_gb < math.inf:
        raise ConversionError(f"--max-shard-gb is {max_shard_gb}; expected a number above 0.")

    dtypes = {"same": None, "fp32": torch.float32, "bf16": torch.bfloat16}
    with _single_process():
        verification = export.to_hf(
            checkpoint,
            out,
            dtype=dtypes[dtype],
            max_shard_bytes=int(max_shard_gb * 10**9),
            tokenizer_path=tokenizer,
            proof=None
            if no_verify
            else export.Proof(text=text, samples=samples, tolerance=tolerance),
        )
    if verification is not None:
        print(verification)
    print(f"wrote {out}")
    return 0


def from_hf(hf: tyro.conf.Positional[Path], out: Path, vocab_multiple: int = 128) -> int:
    """Write a Hugging Face model as a Megatron checkpoint that training can start from.

    Example: python tools/convert_checkpoint.py from-hf exports/target --out runs/target_again

    Args:
        hf: Folder with config.json and safetensors, of a Qwen3 or a GELU Apertus.
        out: Folder of the checkpoint; give it to a run as training.start_from.
        vocab_multiple: The vocabulary is padded to a multiple of this; a TP size must divide it.
    """
    from megatron_completedp.config.load import to_yaml
    from megatron_completedp.convert import load

    with _single_process():
        shape = load.from_hf(hf, out, vocab_multiple=vocab_multiple)
    model = "".join(f"  {line}\n" for line in to_yaml(shape).splitlines())
    print(
        f"wrote {out}; a run starts from it with\n\nmodel:\n{model}training:\n  start_from: {out}"
    )
    return 0


def verify(
    checkpoint: tyro.conf.Positional[Path],
    hf: tyro.conf.Positional[Path],
    tokenizer: str | None = None,
    text: str | None = None,
    samples: int = 4,
    tolerance: float = 1e-5,
) -> int:
    """Compare a Hugging Face model with the checkpoint it was made from; exit code 1: they differ.

    Example: python tools/convert_checkpoint.py verify runs/target exports/target

    Args:
        checkpoint: A run folder (its newest checkpoint), or a folder step_<n>.
        hf: Folder of the model.
        tokenizer: Tokenizer file; none means the one in the run's config.
        text: Held-out text: a .txt or .jsonl, or a folder of them; none means the validation data.
        samples: Sequences of the model's length to compare the models on.
        tolerance: Largest difference of logits, in units of the largest where that is above 1.
    """
    from megatron_completedp.convert import export

    with _single_process():
        verification = export.verify_export(
            checkpoint,
            hf,
            tokenizer_path=tokenizer,
            proof=export.Proof(text=text, samples=samples, tolerance=tolerance),
        )
    print(verification)
    return 1 if verification.problems else 0


COMMANDS: dict[str, Callable[..., Any]] = {"to-hf": to_hf, "from-hf": from_hf, "verify": verify}


def main(argv: Sequence[str]) -> int:
    """Run the command that `argv` names. Returns the exit code."""
    code: int = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog=PROG, description=DESCRIPTION, args=list(argv)
    )
    return code


@contextmanager
def _single_process() -> Iterator[None]:
    """Megatron in this process alone, on CPU."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("megatron.core", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        import safetensors  # noqa: F401
        import tokenizers  # noqa: F401
        import transformers
    except ImportError as error:
        raise ConversionError(
            f"{error.name} is not installed; conversions need pip install "
            "'megatron_completedp[hf]'."
        ) from error
    transformers.utils.logging.disable_progress_bar()
    # Megatron's loader meets them in torch, where a user can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from megatron_completedp.config.parallel import ParallelConfig
    from megatron_completedp.mcore.parallel import destroy_parallel, initialize_parallel
    from megatron_completedp.mcore.platform import detect_platform

    initialize_parallel(detect_platform("cpu"), ParallelConfig(), timeout_s=3600, seed=0)
    yield
    # Not after an error: the process ends with it.
    destroy_parallel()


if __name__ == "__main__":
    sys.exit(run_command(main))
