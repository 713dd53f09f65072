"""Tokenizers as AutoTokenizer reads them: the ids of training, with nothing put around a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import sentencepiece
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_completedp.convert.tokenizer_files import write_tokenizer
from megatron_completedp.data.tokenizer import load_tokenizer
from tests.mcore.convert_runs import TEXT

EOD = "<|endoftext|>"
LINES = [*TEXT.splitlines(), "W\u00f6rter,  zwei Leerzeichen\n\nund  \t Zeilen", "", " "]


def byte_level() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=[EOD], initial_alphabet=alphabet, show_progress=False
    )
    return tokenizer, trainer


def unigram() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=[EOD, "<unk>"], unk_token="<unk>", show_progress=False
    )
    return tokenizer, trainer


PROCESSORS: dict[str, Any] = {
    "none": None,
    "offsets": processors.ByteLevel(trim_offsets=True),
    "a token before": processors.TemplateProcessing(
        single=f"{EOD} $A", pair=f"{EOD} $A $B", special_tokens=[(EOD, 0)]
    ),
    "a token after": processors.Sequence(
        [processors.TemplateProcessing(single=f"$A {EOD}", special_tokens=[(EOD, 0)])]
    ),
}


def loaded(path: Path, folder: Path) -> Any:
    folder.mkdir()
    write_tokenizer(folder, load_tokenizer(path), seq_length=48)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("make", [byte_level, unigram])
def test_a_tokenizer_json_gives_the_ids_of_training(
    make: Any, processor: str, tmp_path: Path
) -> None:
    tokenizer, trainer = make()
    tokenizer.train_from_iterator(LINES, trainer)
    if PROCESSORS[processor] is not None:
        tokenizer.post_processor = PROCESSORS[processor]
    assert (
        len(tokenizer.encode("x").ids) > len(tokenizer.encode("x", add_special_tokens=False))
    ) == processor.startswith("a token")
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    theirs, ours = loaded(path, tmp_path / "hf"), load_tokenizer(path)
    for line in LINES:
        assert theirs(line)["input_ids"] == ours.encode(line), line
        assert theirs.decode(ours.encode(line)) == ours.decode(ours.encode(line)), line
    assert theirs.eos_token_id == ours.eod
    before, after = (json.loads(file.read_text()) for file in (path, tmp_path / "hf" / path.name))
    assert after == {**before, "post_processor": None}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("prefix", [False, True])
def test_a_sentencepiece_model_gives_the_ids_of_training(
    kind: str, prefix: bool, tmp_path: Path
) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3),
        model_prefix=str(tmp_path / "model"),
        model_type=kind,
        vocab_size=360,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path / "model.model"
    theirs, ours = loaded(path, tmp_path / "hf"), load_tokenizer(path)
    for line in LINES:
        assert theirs(line)["input_ids"] == ours.encode(line), line
