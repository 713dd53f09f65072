"""The sections of a run's configuration that are not about the model or the rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_completedp.core.multipliers import Level
from megatron_completedp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RecipeOrigin:
    """The recipe from which a run has its rules, base, hyperparameters and multipliers."""

    path: str
    """Where its file was."""
    level: Level
    """How fine its multipliers are."""
    sha256: str
    """Of its contents."""
    hand_written: bool = False
    """Its file had no hash that could have told whether it was changed."""

    def __str__(self) -> str:
        """One line for plans and logs."""
        unsure = "; written by hand: its file has no hash" if self.hand_written else ""
        return f"recipe {self.path} (level {self.level}, sha256 {self.sha256[:12]}{unsure})"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Batch, length and numerics of a run. Its length is train_tokens or train_steps."""

    global_batch_size: int
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int = 1
    """Sequences in one forward pass of one data-parallel rank."""
    train_tokens: int | None = None
    """Tokens over the whole run; the last batch is a whole one, so it may see a few more."""
    train_steps: int | None = None
    """Optimizer steps over the whole run; beside train_tokens it must agree with it."""
    start_from: str | None = None
    """Checkpoint, or run folder, whose weights replace the initial ones; the rest starts fresh."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations; bf16 keeps fp32 gradients and master weights."""
    clip_grad: float = 1.0
    """Clip the global gradient norm here; 0 turns it off. The threshold is not scaled with size."""
    z_loss: float = 1e-4
    """Coefficient of logsumexp(logits)^2 in the loss; 0 turns it off."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where a device is present, else cpu."""
    timeout_s: float = 1800.0
    """A rank that finishes no step, evaluation or save in this many seconds ends the job."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "train_tokens", "train_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"training.{name} is {value}; expected at least 1.")
        if self.train_tokens is None and self.train_steps is None:
            raise ConfigError(
                "training.train_tokens and training.train_steps are both missing; the length of "
                "the run is unknown. Give one of them."
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                f"training.global_batch_size is {self.global_batch_size}, which "
                f"training.micro_batch_size = {self.micro_batch_size} does not divide; use a "
                "micro batch that divides it."
            )
        for name in ("clip_grad", "z_loss"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"training.{name} is {value}; expected 0 (off) or more.")
        if not 0 < self.timeout_s < math.inf:
            raise ConfigError(
                f"training.timeout_s is {self.timeout_s}; expected a positive number of seconds, "
                "more than the slowest step, evaluation or save takes."
            )


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """What happens to a step whose loss or gradients are not finite, or whose loss is a spike.

    stop ends the run with exit code 1. skip drops the update: weights and moments stay, the data
    and the schedule move on. rollback also takes weights and moments back to the newest checkpoint,
    so that every batch since then is left out. Either is an event in metrics.jsonl. A skipped step
    is never checkpointed (but at a stop or the end): the fault may be in the weights.
    """

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """For NaN or inf in the loss or a gradient. (In a validation loss, skip means stop.)"""
    on_spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    """For a loss above the median of the last spike_window losses by more than spike_nats."""
    spike_nats: float = 1.0
    """In nats per token."""
    spike_window: int = 100
    """Losses of applied updates; no loss is a spike before there are this many."""
    max_events: int = 20
    """Skips and rollbacks over the whole run, restarts included; one more stops it."""

    def __post_init__(self) -> None:
        if not 0 < self.spike_nats < math.inf:
            raise ConfigError(
                f"divergence.spike_nats is {self.spike_nats}; expected a positive number of nats."
            )
        _require_at_least("divergence.spike_window", self.spike_window, 1)
        _require_at_least("divergence.max_events", self.max_events, 0)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When the validation loss is measured, and on how much."""

    interval: int = 100
    """Steps between evaluations; 0 turns them off."""
    samples: int = 64
    """Sequences in one evaluation, the same ones every time."""

    def __post_init__(self) -> None:
        _require_at_least("evaluation.interval", self.interval, 0)
        _require_at_least("evaluation.samples", self.samples, 1)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Tokenized text. Prefixes may stay empty for commands that read none, such as plan."""

    train: tuple[str, ...] = ()
    """Path prefixes of indexed datasets to train on (without .bin / .idx)."""
    train_weights: tuple[float, ...] = ()
    """Share of each train prefix, in order; empty means in proportion to their sizes."""
    valid: tuple[str, ...] = ()
    """Path prefixes of the indexed datasets to evaluate on."""
    valid_weights: tuple[float, ...] = ()
    """Share of each valid prefix, in order; empty means in proportion to their sizes."""
    tokenizer: str | None = None
    """Path of the tokenizer's file or folder; recorded beside checkpoints."""
    cache_dir: str | None = None
    """Folder for sample indices; none means a folder in run_dir."""
    verify_hashes: bool = False
    """Compare every byte with the manifests at the start, not sizes alone; the ranks divide it."""

    def __post_init__(self) -> None:
        for split in ("train", "valid"):
            prefixes, weights = getattr(self, split), getattr(self, f"{split}_weights")
            if weights and len(weights) != len(prefixes):
                raise ConfigError(
                    f"data.{split}_weights has {len(weights)} entries for {len(prefixes)} "
                    f"data.{split} prefixes; give one weight per prefix, or none at all."
                )
            for weight in weights:
                if not 0 < weight < math.inf:
                    raise ConfigError(
                        f"data.{split}_weights has {weight}; expected positive numbers. Leave a "
                        "prefix out instead of giving it no weight."
                    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written to run_dir, and how many stay."""

    interval: int = 1000
    """Steps between checkpoints; 0 writes none while training."""
    keep_last: int = 2
    """Older checkpoints are deleted beyond this many."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are never deleted; 0 spares none."""
    save_at_end: bool = True
    """Write one after the last step."""
    asynchronous: bool = False
    """Write in a process beside training, from a snapshot; it counts once it is complete."""

    def __post_init__(self) -> None:
        _require_at_least("checkpoint.interval", self.interval, 0)
        _require_at_least("checkpoint.keep_last", self.keep_last, 1)
        _require_at_least("checkpoint.keep_every", self.keep_every, 0)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported while training; metrics.jsonl is always written."""

    interval: int = 10
    """Steps between lines of metrics."""
    tensorboard: bool = False
    """Also write TensorBoard event files."""

    def __post_init__(self) -> None:
        _require_at_least("logging.interval", self.interval, 1)


def _require_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is {value}; expected at least {least}.")
