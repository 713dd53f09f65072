"""The preprocessing job end to end: every document once, in order, and named errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from data_samples import TEXTS, VOCAB_SIZE, write_jsonl
from preprocess_runs import (
    SHARDS,
    arguments,
    shard_hashes,
    texts_of,
)

from megatron_completedp.data import preprocess as job
from megatron_completedp.data.indexed import open_pair
from megatron_completedp.data.manifest import load_manifest
from megatron_completedp.data.settings import build_preprocess
from megatron_completedp.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_completedp.errors import ConfigError, DataError


@pytest.fixture
def own_source(source: Path, tmp_path: Path) -> Path:
    """A copy of the sources that a test may spoil."""
    return Path(shutil.copytree(source, tmp_path / "source"))


def read_documents(prefix: Path, model: Path) -> list[str]:
    tokenizer = load_tokenizer(model)
    ids, lengths = open_pair(prefix)
    texts, position = [], 0
    for length in lengths:
        *document, end = ids[position : position + length].tolist()
        assert end == tokenizer.eod
        texts.append(tokenizer.decode(document))
        position += length
    return texts


def test_every_document_once_in_order(reference: Path) -> None:
    """And nothing but pairs, manifests and the job's three files is in the folder."""
    for key in SHARDS:
        assert read_documents(reference / key, reference / "tokenizer.model") == texts_of(key)
    suffixes = (".bin", ".idx", ".json")
    assert set(shard_hashes(reference)) == {key + suffix for key in SHARDS for suffix in suffixes}
    files = {path.name for path in reference.iterdir() if path.is_file()}
    assert files == {"tokenizer.model", "preprocess.yaml", "blend.yaml"}


@pytest.mark.parametrize("workers", [2, 5])
def test_the_bytes_do_not_depend_on_the_workers(
    source: Path, reference: Path, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "out"
    job.main(arguments(source, out, "--workers", str(workers)))
    assert shard_hashes(out) == shard_hashes(reference)


def test_a_bad_file_costs_its_own_shard(own_source: Path, reference: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", own_source / "corpus" / "c4" / "c4-train.00000-of-00002.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b'{"text": 3}\n' * 50 + whole)
    with pytest.raises(DataError, match=r"1 of 4 shards.*\n.*jsonl:1 \(text_not_string") as caught:
        job.main(arguments(own_source, out, "--workers", "2"))
    assert caught.value.exit_code == 1
    assert not list(out.glob("c4/c4-train.00000*"))
    assert load_manifest(out / "wikipedia" / "wiki").documents == 1500
    path.write_bytes(whole)
    job.main(arguments(own_source, out, "--workers", "2"))
    assert shard_pairs(out) == shard_pairs(reference)


def shard_pairs(out: Path) -> dict[str, str]:
    """`shard_hashes` without manifests, which name the paths of their inputs."""
    return {name: sha for name, sha in shard_hashes(out).items() if not name.endswith(".json")}


def test_rows_left_out_are_counted(
    own_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (own_source / "corpus" / "wikipedia" / "wiki.jsonl").open("a") as stream:
        stream.write('{"text": ""}\n{"text": "torn\n')
    job.main(arguments(own_source, tmp_path / "out", "--workers", "1"))
    assert load_manifest(tmp_path / "out" / "wikipedia" / "wiki").skipped == {
        "empty_text": 1,
        "torn_json": 1,
    }
    assert "1 empty_text, 1 torn_json" in capsys.readouterr().out


def test_another_run_s_folder_is_refused(
    source: Path, own_source: Path, reference: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(reference, tmp_path / "out"))
    before = shard_hashes(out)
    other = train_sentencepiece([text[::-1] for text in TEXTS], VOCAB_SIZE, tmp_path / "o.model")

    def refused(kind: type[Exception], message: str, *flags: str, folder: Path = source) -> None:
        with pytest.raises(kind, match=message):
            job.main(arguments(folder, out, "--workers", "1", *flags))
        assert shard_hashes(out) == before

    refused(ConfigError, "max_bad_fraction: 0.01 there, 0.5 now", "--max-bad-fraction", "0.5")
    refused(ConfigError, "engine: auto there, reference now", "--engine", "reference")
    refused(ConfigError, "sources: ", folder=own_source)
    refused(ConfigError, f"{other.path} has {other.sha256}", "--tokenizer", str(other.path))
    # Without the folder's settings each manifest still keeps its shard from being replaced.
    (out / "preprocess.yaml").unlink()
    refused(DataError, "max_bad_fraction 0.01; asked for 0.5", "--max-bad-fraction", "0.5")
    (out / "preprocess.yaml").unlink()
    write_jsonl(own_source / "corpus" / "book" / "book.jsonl", ["another text"])
    refused(DataError, r"book.json: made with input bytes \d+; asked for", folder=own_source)
    (out / "preprocess.yaml").unlink()
    (out / "tokenizer.model").unlink()
    refused(DataError, "made with tokenizer_sha256", "--tokenizer", str(other.path))


def test_a_tokenizer_trained_in_place(source: Path, tmp_path: Path) -> None:
    """Deterministic, kept, and not trained again."""
    made = []
    for name in ("a", "b"):
        out = tmp_path / name
        flags = ["--sources", str(source / "corpus"), "--out", str(out), "--workers", "1"]
        flags += ["--train-tokenizer.vocab-size", "400", "--train-tokenizer.sample-mb", "0.05"]
        job.main(flags)
        made.append(shard_hashes(out))
        assert load_tokenizer(out / "tokenizer.model").vocab_size == 400
    assert made[0] == made[1]
    (out / "preprocess.yaml").read_text()
    job.main(flags)
    assert shard_hashes(out) == made[1]


def test_merged_by_subset_and_a_mixture(source: Path, reference: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "out", tmp_path / "job.yaml"
    shutil.copytree(reference, out)
    tree = {
        "sources": [str(source / "corpus")],
        "tokenizer": str(source / "tokenizer.model"),
        "out": str(out),
        "workers": 1,
        "merge": "subset",
        "weights": {"book": 1, "c4": 2, "wikipedia": 1},
    }
    config.write_text(yaml.safe_dump(tree))
    assert job.main(["--config", str(config)]) == 0
    both = texts_of("c4/c4-train.00000-of-00002") + texts_of("c4/c4-train.00001-of-00002")
    assert read_documents(out / "merged" / "c4", out / "tokenizer.model") == both
    data = yaml.safe_load((out / "blend.yaml").read_text())["data"]
    assert data["train"] == [str(out / "merged" / name) for name in ("book", "c4", "wikipedia")]
    assert data["train_weights"] == [0.25, 0.5, 0.25]


def test_a_subset_that_merging_would_write_over(source: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c4.jsonl", TEXTS)
    tree = {
        "sources": [str(source / "corpus"), {"path": str(path), "subset": "merged"}],
        "tokenizer": str(source / "tokenizer.model"),
        "out": str(tmp_path / "out"),
        "merge": "subset",
    }
    with pytest.raises(ConfigError, match="also the folder of the subset merged"):
        job.preprocess(build_preprocess(tree))
    assert not (tmp_path / "out").exists()


def test_dry_run_and_inspect(
    source: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main(arguments(source, tmp_path / "out", "--dry-run", "--workers", "3")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == [
        "wikipedia/wiki",
        "c4/c4-train.00000-of-00002",
        "c4/c4-train.00001-of-00002",
        "book/book",
    ]
    assert "4 shards" in lines[-1]
    assert "3 workers" in lines[-1]
    assert not (tmp_path / "out").exists()
    assert job.main(["--inspect", str(reference / "book" / "book"), "--documents", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- document") == 2
    for text in texts_of("book/book")[:2]:
        assert text in shown
    assert texts_of("book/book")[2] not in shown


def test_inspect_needs_the_tokenizer_that_made_the_pair(reference: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(reference / "book", tmp_path / "book"))
    train_sentencepiece([text[::-1] for text in TEXTS], VOCAB_SIZE, tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match="in no folder above it"):
        job.main(["--inspect", str(out / "book")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "o", "--tokenizer", "t"], "missing: sources"),
        (["--sources", "absent", "--out", "o", "--tokenizer", "t"], "absent"),
        (
            ["--sources", "{corpus}", "--out", "o", "--tokenizer", "absent"],
            "tokenizer absent does not",
        ),
    ],
)
def test_what_does_not_exist_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [flag.format(corpus=source / "corpus") for flag in flags]
    with pytest.raises((ConfigError, DataError), match=message):
        job.main(flags)


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        job.main(["--help"])
    assert stopped.value.code == 0
    assert "--config examples/preprocess/redpajama.yaml" in capsys.readouterr().out
