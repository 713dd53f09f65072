"""The settings of a preprocessing job: strict, from YAML or flags, and contradictions named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_completedp.config.cli import read_arguments
from megatron_completedp.config.load import read_yaml, to_yaml
from megatron_completedp.data.preprocess import CommandFlags
from megatron_completedp.data.settings import PreprocessConfig, build_preprocess
from megatron_completedp.data.sources import Format, Source
from megatron_completedp.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples" / "preprocess"
TREE: dict[str, Any] = {
    "sources": ["data/a", {"path": "b.jsonl", "format": "jsonl", "subset": "notes"}],
    "out": "out",
    "tokenizer": "t.json",
}


def from_flags(*flags: str) -> PreprocessConfig:
    tree, _ = read_arguments(flags, PreprocessConfig, prog="x", description="x", extra=CommandFlags)
    return build_preprocess(tree)


def test_a_source_is_a_path_or_a_section() -> None:
    config = build_preprocess(TREE)
    assert config.sources == (
        Source(path="data/a"),
        Source(path="b.jsonl", format=Format.JSONL, subset="notes"),
    )
    assert config.weights == {}


def test_every_value_survives_the_file_that_is_kept() -> None:
    changes = {"weights": {"c4": 0.5, "notes": 2}, "merge": "subset", "max_bad_fraction": "1e-3"}
    config = build_preprocess({**TREE, **changes})
    assert config.max_bad_fraction == 0.001  # YAML 1.1 reads it as text
    assert build_preprocess(yaml.safe_load(to_yaml(config))) == config


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**TREE, "workers": 3}))
    config = from_flags("--config", str(path), "--sources", "c", "d", "--engine", "reference")
    assert [source.path for source in config.sources] == ["c", "d"]
    assert (config.engine, config.workers, config.out) == ("reference", 3, "out")


def test_a_tokenizer_section_from_flags() -> None:
    config = from_flags("--sources", "a", "--out", "o", "--train-tokenizer.vocab-size", "8e3")
    assert config.train_tokenizer is not None
    assert config.train_tokenizer.vocab_size == 8000


def test_processes_are_the_cpus_granted_unless_asked() -> None:
    assert build_preprocess({**TREE, "workers": 7}).processes == 7
    assert build_preprocess(TREE).processes >= 1


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_load(path: Path) -> None:
    assert build_preprocess(read_yaml(path)).out.startswith("data/")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "sources is empty"),
        ({"sources": [3]}, r"sources\[0\] is 3"),
        ({"sources": [{"path": "a", "fromat": "jsonl"}]}, "did you mean sources.*format"),
        ({"sources": [{"path": "a", "format": "csv"}]}, "expected one of redpajama-1t"),
        ({"tokenizer": None}, "neither is given"),
        ({"train_tokenizer": {}}, "both are given"),
        ({"tokeniser": "x"}, "did you mean tokenizer"),
        ({"hidden_size": 3}, "expected one of sources, out"),
        ({"workers": 0}, "workers is 0"),
        ({"max_bad_fraction": 1}, "max_bad_fraction is 1"),
        ({"mixture": "pile"}, "expected one of tokens, redpajama"),
        ({"mixture": "redpajama", "weights": {"c4": 1}}, "give one of them"),
        ({"weights": {"c4": 0}}, "weights.c4 is 0"),
        ({"weights": {"c4": "much"}}, "weights.c4 is 'much'"),
        ({"merge": "all", "mixture": "redpajama"}, "nothing to mix"),
        ({"tokenizer": None, "train_tokenizer": {"vocab_size": 100}}, "at least 260"),
        ({"tokenizer": None, "train_tokenizer": {"sample_mb": 0}}, "sample_mb is 0"),
    ],
)
def test_a_bad_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_preprocess({**TREE, **changes})
