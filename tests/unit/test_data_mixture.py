"""Shares of a blend: the published ones, any given ones, and tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_completedp.config.load import build
from megatron_completedp.config.sections import DataConfig
from megatron_completedp.data.mixture import (
    REDPAJAMA_SHARES,
    Pair,
    blend_weights,
    subset_weights,
    write_blend,
)
from megatron_completedp.data.settings import PreprocessConfig, build_preprocess
from megatron_completedp.errors import ConfigError

PAIRS = [
    Pair(Path("out/c4/a"), "c4", 100),
    Pair(Path("out/c4/b"), "c4", 300),
    Pair(Path("out/book/book"), "book", 600),
]


def job(**changes: Any) -> PreprocessConfig:
    return build_preprocess({"sources": ["x"], "out": "out", "tokenizer": "t.json", **changes})


def test_by_tokens_every_token_is_as_likely() -> None:
    assert subset_weights(job(), ["c4", "book"]) is None
    assert blend_weights(PAIRS, None) == pytest.approx([0.1, 0.3, 0.6], rel=1e-15)


def test_a_subset_share_is_divided_by_tokens() -> None:
    weights = subset_weights(job(weights={"c4": 3, "book": 1}), ["c4", "book"])
    # 3/4 to c4, of which a quarter and three quarters; 1e-15: one rounding per operation.
    expected = [0.75 * 0.25, 0.75 * 0.75, 0.25]
    assert blend_weights(PAIRS, weights) == pytest.approx(expected, rel=1e-15)


def test_the_published_shares() -> None:
    """Billions of tokens as published: each share to the two digits that are published."""
    billions = {
        "common_crawl": 878,
        "c4": 175,
        "github": 59,
        "arxiv": 28,
        "book": 26,
        "wikipedia": 24,
        "stackexchange": 20,
    }
    for subset, tokens in billions.items():
        share = 100 * tokens / sum(billions.values())
        assert REDPAJAMA_SHARES[subset] == pytest.approx(share, abs=0.005)
    weights = subset_weights(job(mixture="redpajama"), list(billions))
    assert weights == dict(REDPAJAMA_SHARES)


def test_published_shares_of_what_is_there(caplog: pytest.LogCaptureFixture) -> None:
    weights = subset_weights(job(mixture="redpajama"), ["c4", "book"])
    assert "without arxiv, common_crawl, github, stackexchange, wikipedia" in caplog.text
    a, b, book = blend_weights(PAIRS, weights)
    assert math.isclose((a + b) / book, 14.46 / 2.15, rel_tol=1e-14)
    assert math.isclose(a + b + book, 1, rel_tol=1e-14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"c4": 1}}, "subset book has no weight"),
        ({"weights": {"c4": 1, "book": 1, "bok": 2}}, "no such subset; did you mean book"),
        ({"weights": {"c4": 1, "book": 1, "x": 2}}, "they hold book, c4"),
        ({"mixture": "redpajama"}, "subset notes has no weight in the mixture"),
    ],
)
def test_a_mixture_that_does_not_fit_the_sources(changes: Any, message: str) -> None:
    subsets = ["c4", "book"] if "weights" in changes else ["c4", "notes"]
    with pytest.raises(ConfigError, match=message):
        subset_weights(job(**changes), subsets)


def test_the_blend_is_a_run_s_data_section(tmp_path: Path) -> None:
    path = tmp_path / "blend.yaml"
    write_blend(path, PAIRS, blend_weights(PAIRS, None), Path("out/tokenizer.json"))
    data = build(DataConfig, yaml.safe_load(path.read_text())["data"])
    assert data.train == ("out/c4/a", "out/c4/b", "out/book/book")
    assert data.train_weights == tuple(blend_weights(PAIRS, None))
    assert data.tokenizer == "out/tokenizer.json"
