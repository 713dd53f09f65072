"""From JSONL to token files: every document once, in order, or an error with file and line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_samples import TEXTS, small_tokenizer, write_jsonl

from megatron_completedp.data.indexed import bin_path, check_pair
from megatron_completedp.data.jsonl import read_texts
from megatron_completedp.data.prepare import load_summary, prepare, summary_path
from megatron_completedp.errors import DataError


def test_documents_in_order_each_with_its_end(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path)
    # More than one batch, and a text that is empty: 301 rows, 300 documents.
    texts = [f"{TEXTS[i % 3]} number {i} caf\u00e9" for i in range(300)]
    inputs = [
        write_jsonl(tmp_path / "a.jsonl", texts[:120]),
        write_jsonl(tmp_path / "b.jsonl", ["", *texts[120:]]),
    ]
    summary = prepare(inputs, tokenizer, tmp_path / "train")

    ids = np.fromfile(bin_path(tmp_path / "train"), dtype="<u2").tolist()
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eod]
    starts = [0, *(end + 1 for end in ends)]
    decoded = [tokenizer.decode(ids[a:b]) for a, b in zip(starts, ends, strict=False)]
    assert decoded == texts
    assert ends[-1] == len(ids) - 1

    pair = check_pair(tmp_path / "train")
    assert summary.documents == pair.documents == 300
    assert summary.empty_documents == 1
    assert summary.tokens == pair.tokens == len(ids)
    assert summary.text_bytes == sum(len(text.encode()) for text in texts)
    assert summary.max_token_id == max(ids)
    assert summary.tokens_per_byte == summary.tokens / summary.text_bytes
    assert load_summary(tmp_path / "train") == summary


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "torn', "not a JSON object"),
        (b"", "not a JSON object"),
        (b'{"text": "\xff"}', "not a JSON object"),
        (b'{"raw_content": "x"}', r"keys \['raw_content'\]; expected .* \"text\""),
        (b'["text"]', "a list; expected an object"),
        (b'{"text": null}', "is a NoneType; expected a string"),
        (b'{"text": "\\ud800"}', "not valid Unicode"),
    ],
)
def test_a_bad_row_is_named_and_leaves_the_old_pair(
    tmp_path: Path, line: bytes, message: str
) -> None:
    tokenizer = small_tokenizer(tmp_path)
    good = write_jsonl(tmp_path / "good.jsonl", TEXTS)
    before = prepare([good], tokenizer, tmp_path / "train")
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(good.read_bytes() + line + b"\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl:4: .*{message}"):
        prepare([bad], tokenizer, tmp_path / "train")
    assert check_pair(tmp_path / "train").tokens == before.tokens
    # The summary is what says "finished": a failed run must not leave one.
    assert not summary_path(tmp_path / "train").exists()


def test_inputs_that_hold_nothing(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no input files"):
        prepare([], tokenizer, tmp_path / "train")
    with pytest.raises(DataError, match=r"absent\.jsonl does not exist"):
        prepare([tmp_path / "absent.jsonl"], tokenizer, tmp_path / "train")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(DataError, match=r"empty\.jsonl has no row"):
        prepare([empty], tokenizer, tmp_path / "train")
    only_empty_texts = write_jsonl(tmp_path / "hollow.jsonl", ["", ""])
    with pytest.raises(DataError, match="no document"):
        prepare([only_empty_texts], tokenizer, tmp_path / "train")


def test_a_row_may_have_meta_first_or_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"meta": "{}", "text": "a"}\n{"text": "b", "wiki_prob": 0.5}\n')
    assert list(read_texts(path)) == ["a", "b"]


def test_a_summary_that_is_not_one(tmp_path: Path) -> None:
    for content in (None, "", "[]", '{"documents": 1}'):
        if content is not None:
            (tmp_path / "train.json").write_text(content)
        with pytest.raises(DataError, match=r"train\.json is not the summary"):
            load_summary(tmp_path / "train")
