"""What a conversion needs to know of a checkpoint, from the files beside its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_completedp.config.load import build, read_yaml
from megatron_completedp.config.run import RunConfig
from megatron_completedp.convert.mapping import ForwardMultipliers
from megatron_completedp.core.hyperparams import ResidualMultiplier
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.data.manifest import load_manifest
from megatron_completedp.data.tokenizer import Tokenizer, load_tokenizer
from megatron_completedp.errors import CheckpointError, ConversionError, DataError
from megatron_completedp.mcore.checkpoint_info import (
    CONFIG_FILE,
    TABLE_FILE,
    find_checkpoint,
    read_table,
)
from megatron_completedp.mcore.manifest import verify


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint whose files are as they were written."""

    checkpoint: Path
    shape: ModelShape
    multipliers: ForwardMultipliers
    config: RunConfig | None
    """The run that wrote it; None when it came from Hugging Face."""

    @property
    def run_dir(self) -> Path:
        """The folder of the run, where the checkpoint lies as it was written."""
        return self.checkpoint.parent.parent

    def tokenizer(self, given: str | None) -> Tokenizer:
        """The tokenizer in the file `given`, or else the one the run was trained with.

        Raises ConversionError when there is none, when it has ids beyond the embedding, and when a
        manifest of the run's training data says that another tokenizer made it.
        """
        path = given or (self.config.data.tokenizer if self.config else None)
        if path is None:
            raise ConversionError(
                f"{self.checkpoint} names no tokenizer; give the file with --tokenizer."
            )
        tokenizer = load_tokenizer(Path(path))
        if tokenizer.vocab_size > self.shape.vocab_size:
            raise ConversionError(
                f"tokenizer {path} has {tokenizer.vocab_size} ids, but the model's vocab_size is "
                f"{self.shape.vocab_size}. Give the one it was trained with by --tokenizer."
            )
        self._check_trained_with(tokenizer)
        return tokenizer

    def _check_trained_with(self, tokenizer: Tokenizer) -> None:
        """Hold `tokenizer` to the training data, as far as its manifests are still there."""
        for prefix in self.config.data.train if self.config else ():
            try:
                manifest = load_manifest(Path(prefix))
            except DataError:
                continue
            if manifest.tokenizer_sha256 != tokenizer.sha256:
                raise ConversionError(
                    f"tokenizer {tokenizer.path} has sha256 {tokenizer.sha256}, but {prefix}, "
                    f"which the model was trained on, was made with {manifest.tokenizer_sha256}. "
                    "The same ids mean other text; give the file it was made with by --tokenizer."
                )


def open_source(path: Path) -> Source:
    """The checkpoint at `path`, or the newest one of the run folder `path`.

    Reads every byte, to hold the files to their manifest. Raises CheckpointError when one is
    missing or damaged.
    """
    checkpoint = find_checkpoint(path)
    verify(checkpoint)
    try:
        tree = read_yaml(checkpoint / CONFIG_FILE)
        table: dict[str, Any] = read_table(checkpoint)
        multipliers = ForwardMultipliers(
            residual=tuple(ResidualMultiplier(**entry) for entry in table["residual"]),
            logit=table["logit_multiplier"],
        )
        shape = build(ModelShape, tree["model"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint} does not say which model it is ({error!r}); expected {CONFIG_FILE} with "
            f"a model section and {TABLE_FILE} with the multipliers."
        ) from error
    # What came from Hugging Face has a model section and nothing else.
    config = build(RunConfig, tree) if tree.keys() != {"model"} else None
    return Source(checkpoint=checkpoint, shape=shape, multipliers=multipliers, config=config)
