"""A base run, ladders on it, and rows as if they had been trained with known optima."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from config_samples import small_tree

from megatron_completedp.check.ladder import Ladder
from megatron_completedp.check.transfer_settings import TransferSettings
from megatron_completedp.config.load import build
from megatron_completedp.config.run import RunConfig
from megatron_completedp.study.tasks import Point

#: Validation loss of a point, infinite where it diverged.
Losses = Callable[[Point], float]


def base_run(**changes: Any) -> RunConfig:
    """2 layers of width 32 (4 heads of 8), 8 x 16 tokens per step for 100 steps; its own base."""
    tree = {
        "base": None,
        "model.num_layers": 2,
        "model.hidden_size": 32,
        "model.ffn_hidden_size": 88,
        "model.num_attention_heads": 4,
    }
    return build(RunConfig, small_tree(**{**tree, **changes}))


def ladder(base: RunConfig | None = None, **settings: Any) -> Ladder:
    """A ladder of widths 32 and 64, or whatever `settings` say."""
    settings = {"sizes": (32, 64), **settings}
    return Ladder(TransferSettings(**settings), base or base_run(), Path("runs/study"))


def parabola(best: dict[int, float]) -> Losses:
    """3 nats at the best log2 multiple of each size, 0.1 more an octave away, all seeds alike."""

    def loss(point: Point) -> float:
        labels = point.labels
        return 3.0 + 0.1 * (labels["log2_multiple"] - best[labels["size"]]) ** 2

    return loss


def rows_of(study: Ladder, losses: Losses) -> list[dict[str, Any]]:
    """The rows of the whole study, trained round by round as the command would."""
    rows: list[dict[str, Any]] = []
    while missing := study.missing(rows):
        for point in missing:
            loss = losses(point)
            row = {"id": point.id, **point.labels, "diverged": loss == float("inf"), "loss": loss}
            rows.append(row)
    return rows
