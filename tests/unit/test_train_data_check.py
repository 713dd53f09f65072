"""Data is held to its manifests before a run's first step, and the blend is told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from config_samples import small_tree
from data_samples import TEXTS, VOCAB_SIZE, small_tokenizer
from pair_samples import write_pair

from megatron_completedp.config.load import build
from megatron_completedp.config.run import RunConfig
from megatron_completedp.data.indexed import bin_path
from megatron_completedp.data.manifest import manifest_path
from megatron_completedp.data.tokenizer import train_sentencepiece
from megatron_completedp.errors import ConfigError, DataError
from megatron_completedp.train.data_check import MAX_ROWS, check_data, describe_blend


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """The data section of a run on two pairs, and one to evaluate on."""
    tokenizer = small_tokenizer(tmp_path)
    for name, copies in (("a", 40), ("b", 10), ("valid", 40)):
        write_pair(tmp_path / name, TEXTS * copies, tokenizer)
    return {
        "train": [str(tmp_path / "a"), str(tmp_path / "b")],
        "valid": [str(tmp_path / "valid")],
        "tokenizer": str(tmp_path / "tokenizer.model"),
    }


def check(data: dict[str, Any], *, rank: int = 0, world_size: int = 1, **changes: Any) -> None:
    config = build(RunConfig, small_tree(data=data, **changes))
    check_data(config, rank=rank, world_size=world_size)


def flip_a_bit(prefix: str) -> None:
    path = bin_path(Path(prefix))
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


def test_whole_data_passes_and_its_shares_are_told(
    data: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    check({**data, "train_weights": [1, 3], "verify_hashes": True})
    first, second = [
        line.split() for line in caplog.text.splitlines() if line.endswith(("/a", "/b"))
    ]
    # Four fifths of the tokens are in a; three quarters of the run's are from b.
    assert [first[1], first[2], first[4]] == ["0.2000", "0.7500", data["train"][1]]
    assert [second[1], second[2], second[4]] == ["0.8000", "0.2500", data["train"][0]]


def test_shares_and_epochs() -> None:
    lines = describe_blend(["a", "b"], [1, 3], [800, 200], 4000).splitlines()
    assert lines[0] == "1,000 training tokens on disk; the run reads 4,000, 4.00 times that"
    assert lines[2].split() == ["200", "0.2000", "0.7500", "15.000", "b"]
    assert lines[3].split() == ["800", "0.8000", "0.2500", "1.250", "a"]
    # Without weights Megatron takes tokens, so that every pair is read as often.
    for line in describe_blend(["a", "b"], [], [800, 200], 4000).splitlines()[2:]:
        assert line.split()[3] == "4.000"
    many = describe_blend([f"p{i}" for i in range(2084)], [], [7] * 2084, 99).splitlines()
    assert len(many) == MAX_ROWS + 3
    assert many[-1] == f"and {2084 - MAX_ROWS} more pairs"


def test_a_size_that_is_not_the_manifest_s(data: dict[str, Any]) -> None:
    path = bin_path(Path(data["train"][1]))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"b\.bin"):
        check(data)


def test_a_flipped_bit_is_found_by_the_rank_whose_pair_it_is(data: dict[str, Any]) -> None:
    flip_a_bit(data["train"][1])
    check(data)  # its size is right
    verify = {**data, "verify_hashes": True}
    with pytest.raises(DataError, match=r"b\.bin"):
        check(verify)
    with pytest.raises(DataError, match=r"b\.bin"):
        check(verify, rank=1, world_size=2)
    check(verify, rank=0, world_size=2)


def test_another_tokenizer_than_the_data_s(data: dict[str, Any], tmp_path: Path) -> None:
    texts = [text[::-1] for text in TEXTS]
    other = train_sentencepiece(texts, VOCAB_SIZE, tmp_path / "other.model")
    with pytest.raises(DataError, match=rf"a\.json: made with .*{other.sha256}"):
        check({**data, "tokenizer": str(other.path)})


def test_a_pair_of_another_tool(data: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    manifest_path(Path(data["train"][0])).unlink()
    check(data)
    assert "a has no manifest" in caplog.text
    with pytest.raises(DataError, match=r"a\.json does not exist, so data.verify_hashes"):
        check({**data, "verify_hashes": True})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.train": []}, "data.train is empty"),
        ({"data.valid": []}, "data.valid is empty"),
        ({"data.tokenizer": None}, "data.tokenizer is missing"),
        ({"model.vocab_size": VOCAB_SIZE - 1}, f"has {VOCAB_SIZE} ids but model.vocab_size"),
    ],
)
def test_a_config_that_does_not_fit_the_data(
    data: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(data, **changes)


def test_too_little_to_evaluate_on(data: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="the validation data has"):
        check(data, **{"evaluation.samples": 10_000})
