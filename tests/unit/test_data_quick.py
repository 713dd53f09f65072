"""The corpus that needs no download, and the folder that `quick` makes of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_samples import write_stdlib

from megatron_completedp.data import __main__ as command
from megatron_completedp.data import merge, restart
from megatron_completedp.data import quick as quick_module
from megatron_completedp.data.indexed import bin_path, check_pair, idx_path
from megatron_completedp.data.quick import QuickSettings, quick
from megatron_completedp.data.sample_corpus import write_sample_corpus
from megatron_completedp.errors import ConfigError, DataError

SETTINGS = QuickSettings(max_mb=0.02, valid_mb=0.004, vocab_size=330)


def rows_of(folder: Path, split: str, subset: str) -> list[dict[str, Any]]:
    (path,) = (folder / split / subset).glob("*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def make(tmp_path: Path, name: str, max_mb: float = 0.02, valid_mb: float = 0.004) -> Path:
    stdlib = tmp_path / "lib"
    if not stdlib.exists():
        write_stdlib(stdlib)
    write_sample_corpus(tmp_path / name, max_mb=max_mb, valid_mb=valid_mb, stdlib=stdlib)
    return tmp_path / name


def test_rows_have_the_shapes_of_their_subsets(tmp_path: Path) -> None:
    out = make(tmp_path, "out")
    for split in ("train", "valid"):
        for row in rows_of(out, split, "c4"):
            assert list(row) == ["text", "meta"]
            assert {"timestamp", "url", "language", "source"} <= set(row["meta"])
            assert row["meta"]["license"] == "PSF-2.0"
        for row in rows_of(out, split, "github"):
            assert {"content_hash", "repo_name", "path", "language"} <= set(row["meta"])
            assert row["meta"]["content_hash"] == hashlib.md5(row["text"].encode()).hexdigest()
            assert row["meta"]["license"] == "PSF-2.0"
    (path,) = (out / "train" / "github").iterdir()
    assert path.name.startswith("filtered_")
    assert path.name.endswith(".sampled.jsonl")


def test_skipped_code_stays_out_and_nothing_is_imported(tmp_path: Path) -> None:
    out = make(tmp_path, "out", max_mb=10, valid_mb=0.004)
    paths = {
        row["meta"]["path"] for split in ("train", "valid") for row in rows_of(out, split, "github")
    }
    assert "Lib/antigravity.py" in paths  # its import would have ended this process
    assert len(paths) == 31
    urls = [row["meta"]["url"] for row in rows_of(out, "train", "c4")]
    assert any(url.endswith(tuple(f".double_{i}" for i in range(30))) for url in urls)
    assert any(url.startswith("pydoc:topic") for url in urls)


def test_splits_share_no_text(tmp_path: Path) -> None:
    """No row twice, and no validation docstring inside a training module."""
    out = make(tmp_path, "out", max_mb=10, valid_mb=0.008)
    rows = {
        split: rows_of(out, split, "c4") + rows_of(out, split, "github")
        for split in ("train", "valid")
    }
    texts = [row["text"] for split in rows.values() for row in split]
    assert len(texts) == len(set(texts)) == 10 + 30 * 3 + 1  # topics, modules, antigravity
    training = "\n".join(row["text"] for row in rows["train"])
    for row in rows["valid"]:
        assert row["text"] not in training
    for row in rows["train"]:  # the control: what is in training is found there
        assert row["text"] in training


def test_amounts_are_kept_and_more_text_moves_no_row(tmp_path: Path) -> None:
    small, large = make(tmp_path, "small", max_mb=0.012), make(tmp_path, "large", max_mb=0.024)
    size = {}
    for out in (small, large):
        for split in ("train", "valid"):
            found = rows_of(out, split, "c4") + rows_of(out, split, "github")
            size[out.name, split] = sum(len(row["text"].encode()) for row in found)
    assert size["small", "train"] <= 8_000 < size["large", "train"] <= 20_000
    assert size["small", "valid"] <= size["large", "valid"] <= 4_000
    held_out = {row["text"] for row in rows_of(large, "valid", "github")}
    trained = {row["text"] for row in rows_of(small, "train", "github")}
    assert not held_out & trained


def test_same_text_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file system lists folders in another order and two modules are equal."""
    stdlib = write_stdlib(tmp_path / "lib")
    for name in ("module_3_copy.py", "a_copy.py"):
        (stdlib / "package" / name).write_bytes((stdlib / "package" / "module_3.py").read_bytes())
    walk = os.walk
    made = []
    for backwards in (False, True):

        def listed(
            top: Path, reverse: bool = backwards
        ) -> Iterator[tuple[str, list[str], list[str]]]:
            for folder, subfolders, names in walk(top):
                yield folder, subfolders, sorted(names, reverse=reverse)

        monkeypatch.setattr(os, "walk", listed)
        made.append(content(make(tmp_path, f"out{backwards}", max_mb=10)))
    assert made[0] == made[1]


def test_amounts_that_cannot_be_met(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 < valid_mb < max_mb"):
        make(tmp_path, "out", max_mb=1, valid_mb=1)
    with pytest.raises(DataError, match="would be empty"):
        make(tmp_path, "out", max_mb=0.02, valid_mb=0.0001)
    with pytest.raises(DataError, match="no help topics"):
        write_sample_corpus(tmp_path, max_mb=1, valid_mb=0.1, stdlib=tmp_path / "nowhere")


def test_quick_makes_whole_pairs_and_a_second_call_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdlib, out = write_stdlib(tmp_path / "lib"), tmp_path / "data"
    first = quick(out, SETTINGS, stdlib=stdlib)
    for split in ("train", "valid"):
        assert check_pair(out / split).tokens == first[split].tokens
        assert first[split].vocab_size == 330
    before = content(out)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a complete part was made again")

    for maker in ("write_sample_corpus", "train_sentencepiece"):
        monkeypatch.setattr(quick_module, maker, never)
    monkeypatch.setattr(restart, "write_shard", never)
    monkeypatch.setattr(merge, "open_indexed", never)
    assert quick(out, SETTINGS, stdlib=stdlib) == first
    assert content(out) == before


@pytest.mark.parametrize(
    "lost", ["train.bin", "valid.idx", "train.json", "tokenizer.model", "pairs"]
)
def test_quick_makes_again_what_was_lost(tmp_path: Path, lost: str) -> None:
    stdlib, out = write_stdlib(tmp_path / "lib"), tmp_path / "data"
    quick(out, SETTINGS, stdlib=stdlib)
    before = content(out)
    shutil.rmtree(out / lost) if lost == "pairs" else (out / lost).unlink()
    quick(out, SETTINGS, stdlib=stdlib)
    assert content(out) == before


def test_quick_sees_a_truncated_pair_and_another_tokenizer(tmp_path: Path) -> None:
    stdlib, out = write_stdlib(tmp_path / "lib"), tmp_path / "data"
    quick(out, SETTINGS, stdlib=stdlib)
    before = content(out)
    whole = (out / "train.bin").read_bytes()
    (out / "train.bin").write_bytes(whole[:-1])
    quick(out, SETTINGS, stdlib=stdlib)
    assert content(out) == before
    quick(tmp_path / "other", replace(SETTINGS, vocab_size=340), stdlib=stdlib)
    (out / "tokenizer.model").write_bytes((tmp_path / "other" / "tokenizer.model").read_bytes())
    with pytest.raises(DataError, match="made with tokenizer_sha256"):
        quick(out, SETTINGS, stdlib=stdlib)


def test_quick_refuses_a_folder_of_other_settings(tmp_path: Path) -> None:
    stdlib, out = write_stdlib(tmp_path / "lib"), tmp_path / "data"
    quick(out, SETTINGS, stdlib=stdlib)
    with pytest.raises(ConfigError, match=r"'vocab_size': 330.*asked for.*'vocab_size': 350"):
        quick(out, replace(SETTINGS, vocab_size=350), stdlib=stdlib)


def test_the_commands_make_what_quick_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the running Python's own text, at a size that parses a few modules only."""
    sizes = ["--max-mb", "0.5", "--valid-mb", "0.03"]
    command.main(["quick", "--out", str(tmp_path / "quick"), *sizes, "--vocab-size", "600"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["data", "documents", "MB", "tokens", "tokens/byte"]
    jsonl, model, out = tmp_path / "jsonl", tmp_path / "t.model", tmp_path / "out"
    command.main(["sample", "--out", str(jsonl), *sizes])
    train = str(jsonl / "train")
    command.main(["tokenizer", "--inputs", train, "--out", str(model), "--vocab-size", "600"])
    flags = ["--sources", train, "--tokenizer", str(model), "--out", str(out)]
    command.main(["preprocess", *flags, "--merge", "all", "--workers", "1"])
    for path in (bin_path, idx_path):
        made = path(tmp_path / "quick" / "train").read_bytes()
        assert made == path(out / "merged" / "all").read_bytes()
    assert rows[0].split()[3] == f"{check_pair(out / 'merged' / 'all').tokens:,}"


@pytest.mark.parametrize("name", ["sample", "tokenizer", "quick"])
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"Example: python -m megatron_completedp.data {name}" in capsys.readouterr().out
