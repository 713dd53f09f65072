"""lm-eval on a model of our own: what it has learned scores, what it has not stays at chance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[evaluate]'")
pytest.importorskip("transformers")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_completedp.convert.evaluate import Score, evaluate
from megatron_completedp.convert.evaluate_tasks import read_task
from megatron_completedp.errors import ConfigError, DataError

#: One id per word: 8 words that follow one another in this order.
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def counted(start: int, length: int) -> list[str]:
    return [WORDS[(start + index) % 8] for index in range(length)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that has learned to count, and the same before it had."""
    root = tmp_path_factory.mktemp("models")
    vocabulary = {word: number for number, word in enumerate(["<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=9,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=32,
        )
    )
    for name in ("new", "trained"):
        model.save_pretrained(root / name)
        fast.save_pretrained(root / name)
        ids = torch.tensor([fast(" ".join(counted(i, 16)))["input_ids"] for i in range(8)])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    return {name: root / name for name in ("new", "trained")}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("tasks")
    names = ("pairs", "choices", "contexts", "last", "prose")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for index in range(40):
        words = counted(index, 6)
        text, wrong = " ".join(words), [WORDS[(index + 3) % 8], WORDS[(index + 2) % 8]]
        swapped = [*words[:2], words[3], words[2], *words[4:]]
        rows["pairs"].append({"sentence_good": text, "sentence_bad": " ".join(swapped)})
        choices = [*wrong, WORDS[(index + 6) % 8]]
        rows["choices"].append({"query": text, "choices": choices, "gold": 2})
        contexts = [text, " ".join(counted(index + 3, 6))]
        gold = index % 2  # once the first context is right, once the second
        rows["contexts"].append(
            {
                "context_options": contexts if gold == 0 else contexts[::-1],
                "continuation": choices[2],
                "gold": gold,
            }
        )
        rows["last"].append({"context": text, "continuation": choices[2]})
        rows["prose"].append({"text": " ".join(counted(index, 12))})
    found = []
    for name, lines in rows.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found.append(read_task(file))
    return found


def scores(folder: Path, tasks: list[Any]) -> dict[tuple[str, str], Score]:
    found = evaluate(folder, tasks, device="cpu", dtype="float32", batch_size=8)
    return {(score.task, score.metric): score for score in found}


def test_what_was_learned_scores_and_what_was_not_stays_at_chance(
    folders: dict[str, Path], tasks: list[Any]
) -> None:
    new, trained = (scores(folders[name], tasks) for name in ("new", "trained"))
    for task in ("pairs", "choices", "contexts", "last"):
        assert trained[task, "acc"].value == 1.0
        assert new[task, "acc"].value < 0.8
    assert (new["pairs", "acc"].chance, new["choices", "acc"].chance) == (0.5, pytest.approx(1 / 3))
    assert new["contexts", "acc"].chance == 0.5
    assert new["last", "perplexity"].value > 2 > trained["last", "perplexity"].value
    assert new["pairs", "acc"].standard_error == pytest.approx(
        math.sqrt(new["pairs", "acc"].value * (1 - new["pairs", "acc"].value) / 39), rel=1e-6
    )


def test_bits_per_byte_are_those_of_the_model(folders: dict[str, Path], tasks: list[Any]) -> None:
    (prose,) = (task for task in tasks if task.name == "prose")
    found = scores(folders["new"], [prose])["prose", "bits_per_byte"]
    model = Qwen3ForCausalLM.from_pretrained(folders["new"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders["new"])
    nats, size = 0.0, 0
    for row in prose.rows:
        # lm-eval starts a text with the end-of-document token.
        ids = torch.tensor([[0, *tokenizer(row["text"])["input_ids"]]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits.log_softmax(-1)
        nats -= float(logs[0, :-1].gather(1, ids[0, 1:, None]).sum())
        size += len(row["text"].encode())
    assert found.value == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert (found.chance, found.rows, found.of) == (None, 40, 40)


def test_acc_norm_divides_by_the_characters_of_a_choice(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Against the model's own log-likelihoods; by tokens or not at all, other choices would win."""
    rows = []
    for index in range(40):
        choices = [" ".join(counted(index + shift, 1 + shift)) for shift in range(4)]
        row = {"query": " ".join(counted(index, 4)), "choices": choices, "gold": index % 4}
        rows.append(row)
    file = tmp_path / "lengths.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = scores(folders["new"], [read_task(file)])
    model = Qwen3ForCausalLM.from_pretrained(folders["new"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders["new"])

    def log_likelihood(query: str, choice: str) -> float:
        ids = torch.tensor([tokenizer(f"{query} {choice}")["input_ids"]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits.log_softmax(-1)
        first = len(query.split())
        return float(logs[0, first - 1 : -1].gather(1, ids[0, first:, None]).sum())

    def accuracy(size: Callable[[str], int]) -> float:
        right = 0
        for row in rows:
            each = [log_likelihood(row["query"], c) / size(c) for c in row["choices"]]
            right += each.index(max(each)) == row["gold"]
        return right / len(rows)

    assert found["lengths", "acc"].value == accuracy(lambda choice: 1)
    assert found["lengths", "acc_norm"].value == accuracy(len)
    assert accuracy(len) not in (accuracy(lambda choice: 1), accuracy(lambda c: len(c.split())))


def test_a_device_that_is_not_there_is_refused(folders: dict[str, Path], tasks: list[Any]) -> None:
    with pytest.raises(ConfigError, match="--device is cuda:99, which this machine has not"):
        evaluate(folders["new"], tasks, device="cuda:99", dtype="float32", batch_size=8)


def test_rows_that_the_model_has_no_room_for_are_left_out_and_counted(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """lm-eval stops at the first of them; the model has 32 positions."""
    file = tmp_path / "long.jsonl"
    long = {"query": "one", "choices": [" ".join(counted(0, 40)), "two"], "gold": 1}
    rows = [long, *({**long, "choices": ["two", "four"], "gold": 0} for _ in range(3))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = scores(folders["trained"], [read_task(file)])["long", "acc"]
    assert (score.value, score.rows, score.too_long, score.of) == (1.0, 3, 1, 4)
    file.write_text(json.dumps(long) + "\n")
    with pytest.raises(DataError, match="more than 32 tokens"):
        scores(folders["trained"], [read_task(file)])
