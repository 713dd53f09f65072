"""Interrupted, damaged and foreign input of the conversion: named errors, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")


from megatron_completedp.config.cli import run_command
from megatron_completedp.convert import __main__ as command
from megatron_completedp.convert import export as export_module
from megatron_completedp.convert.export import Proof, to_hf
from megatron_completedp.convert.folder import whole_folder
from megatron_completedp.convert.load import from_hf
from megatron_completedp.convert.source import open_source
from megatron_completedp.data.encoder import Encoder
from megatron_completedp.data.restart import ShardOrder, make_shard
from megatron_completedp.data.sources import Source as TextSource
from megatron_completedp.data.sources import find_files
from megatron_completedp.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_completedp.errors import CheckpointError, ConversionError
from tests.mcore.convert.samples import SINGLE, Weights, check, edit, swap
from tests.mcore.convert_runs import export


def test_an_interrupted_export_is_not_taken_for_whole(
    run: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "write_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(run, text, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_a_name_that_says_so(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with whole_folder(tmp_path / "hf") as folder:
            (folder / SINGLE).write_bytes(b"half")
            os._exit(9)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("hf.unfinished-")
    with whole_folder(tmp_path / "hf") as folder:
        (folder / "whole").touch()
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["whole"]


def test_a_folder_with_files_is_not_overwritten(run: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").touch()
    with pytest.raises(ConversionError, match="not an empty folder; nothing is overwritten"):
        export(run, text, tmp_path / "hf")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine"]


def test_a_checkpoint_without_a_shard(run: Path, text: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(run, tmp_path / "run"))
    next(broken.rglob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match=r"distcp is missing; the manifest lists it"):
        export(broken, text, tmp_path / "hf")


def test_no_checkpoint_and_no_text(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint; expected the folder of a run"):
        to_hf(tmp_path, tmp_path / "hf", proof=Proof())
    with pytest.raises(ConversionError, match=r"no validation data .* give a file of real text"):
        to_hf(run, tmp_path / "hf", proof=Proof())


def test_a_tokenizer_with_more_ids_than_the_model(run: Path, text: Path, tmp_path: Path) -> None:
    words = [(text / "held_out.txt").read_text()]
    train_sentencepiece(words, 370, tmp_path / "large.model")
    with pytest.raises(ConversionError, match="has 370 ids, but the model's vocab_size is 350"):
        to_hf(run, tmp_path / "hf", tokenizer_path=str(tmp_path / "large.model"), proof=None)


def test_a_tokenizer_that_did_not_make_the_data(
    run: Path, text: Path, tmp_path: Path, config: Any
) -> None:
    """Of the same size, which no other check would see."""
    tokenizer = load_tokenizer(text / "tokenizer.model")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "some text"}) + "\n")
    (file,) = find_files([TextSource(path=str(tmp_path / "train.jsonl"))])
    order = ShardOrder(
        out=tmp_path / "pairs",
        tokenizer=tokenizer.path,
        tokenizer_sha256=tokenizer.sha256,
        engine="auto",
        max_bad_fraction=0.0,
    )
    make_shard(order, file, Encoder(tokenizer), wait=True)
    data = replace(config.data, train=("gone", str(order.prefix(file))))
    source = replace(open_source(run), config=replace(config, data=data))
    assert source.tokenizer(None).sha256 == tokenizer.sha256
    words = [(text / "held_out.txt").read_text()[::-1]]
    train_sentencepiece(words, tokenizer.vocab_size, tmp_path / "other.model")
    with pytest.raises(ConversionError, match=r"train, which the model was trained on, was made"):
        source.tokenizer(str(tmp_path / "other.model"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--samples", "0"), "--samples is 0; expected at least 1"),
        (("--tolerance", "nan"), "--tolerance is nan; expected more than 0"),
        (("--text", "latin1.txt"), "latin1.txt cannot be read as UTF-8"),
        (("--text", "missing.txt"), "missing.txt does not exist"),
    ],
)
def test_bad_flags_of_verify(
    flags: tuple[str, str],
    message: str,
    convert: Any,
    run: Path,
    copy: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    held_out = () if flags[0] == "--text" else ("--text", text / "held_out.txt")
    code, output = convert("verify", run, copy, *held_out, *flags)
    assert (code, message in output) == (1, True), output


def test_bad_flags_of_to_hf(
    convert: Any, run: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output = convert("to-hf", run, "--out", tmp_path / "hf", "--max-shard-gb", "nan")
    assert (code, "--max-shard-gb is nan" in output) == (1, True)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    folder = tmp_path / "texts"
    folder.mkdir()
    shutil.copy(text / "held_out.txt", folder / "held_out.txt")
    code, output = convert("to-hf", run, "--out", ".", "--text", folder)
    assert (code, "verified" in output) == (0, True), output
    assert (tmp_path / "cwd" / SINGLE).is_file()


def test_a_folder_that_is_not_there_is_not_looked_for_elsewhere(
    run: Path, text: Path, tmp_path: Path
) -> None:
    """The library would take the name for one on the internet."""
    with pytest.raises(ConversionError, match=r"no config\.json; expected a folder written by"):
        check(run, tmp_path / "exports", text)


def rename(weights: Weights, old: str, new: str) -> None:
    weights[new] = weights.pop(old)


#: What is done to an export, and what `from_hf` says of it.
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (
        lambda f: edit(f, lambda w: w.pop("model.norm.weight")),
        "model.norm.weight is missing",
    ),
    "unknown key": (
        lambda f: edit(f, lambda w: rename(w, "lm_head.weight", "lm_head.bias")),
        "lm_head.bias is unknown to this architecture",
    ),
    "wrong shape": (
        lambda f: edit(f, lambda w: w.update({"lm_head.weight": w["lm_head.weight"][1:]})),
        r"lm_head.weight has shape \(349, 96\), expected \(350, 96\)",
    ),
    "no weights": (lambda f: (f / SINGLE).unlink(), "has neither .* expected weights in"),
    "pickled weights": (
        lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"),
        "can hold code that runs",
    ),
    "cut file": (
        lambda f: os.truncate(f / SINGLE, (f / SINGLE).stat().st_size - 10),
        "damaged or incomplete",
    ),
    "other architecture": (
        lambda f: set_key(f, "model_type", "llama"),
        "model_type is 'llama'; expected one of qwen3",
    ),
    "biases": (lambda f: set_key(f, "attention_bias", True), "attention_bias is True"),
    "scaled rope": (
        lambda f: set_key(f, "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        "rope_type is 'yarn'",
    ),
    "another activation": (lambda f: set_key(f, "hidden_act", "relu"), "hidden_act is 'relu'"),
    "garbled config": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json is missing, garbled or incomplete",
    ),
    "integer weights": (
        lambda f: edit(f, lambda w: w.update({"lm_head.weight": w["lm_head.weight"].char()})),
        "lm_head.weight is stored as I8",
    ),
}


def set_key(folder: Path, key: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_from_hf_names_what_is_wrong(case: str, copy: Path, tmp_path: Path) -> None:
    damage, message = BAD_FOLDERS[case]
    damage(copy)
    with pytest.raises(ConversionError, match=message):
        from_hf(copy, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("case", ["missing", "swapped", "garbled"])
def test_from_hf_holds_shards_to_their_index(
    case: str, run: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    to_hf(run, folder, max_shard_bytes=300_000, proof=None)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    if case == "missing":
        first.unlink()
    elif case == "swapped":
        content = first.read_bytes()
        second.replace(first)
        second.write_bytes(content)
    else:
        (folder / "model.safetensors.index.json").write_text("[]")
    expected = {"missing": "is missing", "swapped": "disagree on", "garbled": "not an index"}
    with pytest.raises(ConversionError, match=expected[case]):
        from_hf(folder, tmp_path / "back")


# The command.


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command in this process, whose Megatron is started: exit code and output."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        monkeypatch.setattr(command, "_single_process", lambda: pytest.MonkeyPatch.context())
        capsys.readouterr()
        code = run_command(command.main)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def test_exit_codes_of_the_command(
    convert: Any, run: Path, copy: Path, text: Path, tmp_path: Path
) -> None:
    held_out = ("--text", text / "held_out.txt")
    code, output = convert("to-hf", run, "--out", tmp_path / "hf", *held_out)
    assert (code, "verified" in output) == (0, True)
    assert convert("verify", run, tmp_path / "hf", *held_out)[0] == 0
    edit(copy, lambda w: swap(w, "mlp.gate_proj.weight", "mlp.up_proj.weight"))
    code, output = convert("verify", run, copy, *held_out)
    assert (code, "FAILED: logits differ" in output) == (1, True)
    code, output = convert("from-hf", tmp_path / "hf", "--out", tmp_path / "back")
    assert (code, "start_from: " in output) == (0, True)
    code, output = convert("to-hf", run, "--out", tmp_path / "hf", *held_out)
    assert (code, "nothing is overwritten" in output) == (1, True)
