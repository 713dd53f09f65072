"""Small texts that the data tests share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_completedp.data.tokenizer import SentencePieceTokenizer, train_sentencepiece

#: 256 bytes, 3 control ids, the letters below, and a few merges.
VOCAB_SIZE = 330

TEXTS = [
    "the quick brown fox jumps over the lazy dog, then the dog jumps over the fox.\n" * 3,
    "def width(layer):\n    return layer.hidden_size  # in elements\n" * 3,
    "a ladder of widths and depths; a table of exponents; a run at every rung.\n" * 3,
]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    """One row per text, with the other keys that a real row has."""
    rows = [{"meta": {"source": "c4"}, "text": text} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small_tokenizer(folder: Path) -> SentencePieceTokenizer:
    """A tokenizer trained on TEXTS, in a file under `folder`."""
    return train_sentencepiece(TEXTS, VOCAB_SIZE, folder / "tokenizer.model")


def write_stdlib(folder: Path) -> Path:
    """A folder shaped like a standard library: help topics, 30 modules, and what to leave out."""
    topics = {f"topic{i}": f"Topic {i} explains statement number {i}. " * 8 for i in range(10)}
    (folder / "pydoc_data").mkdir(parents=True)
    (folder / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n", encoding="utf-8")
    (folder / "package").mkdir()
    for i in range(30):
        text = (
            f'"""Module {i} of the package. {"It computes and returns a value. " * 5}"""\n\n'
            f"def double_{i}(value):\n"
            f'    """Double {i}. {"The value may be any number at all. " * 5}"""\n'
            f"    return 2 * value + {i}\n"
        )
        (folder / "package" / f"module_{i}.py").write_text(text, encoding="utf-8")
    for skipped in ("test/test_a.py", "site-packages/b.py", "_sysconfigdata_linux.py"):
        path = folder / skipped
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise SystemExit('{skipped} was imported')\n", encoding="utf-8")
    # Importing this one would end the test run; parsing it does not.
    (folder / "antigravity.py").write_text("raise SystemExit('imported')\n", encoding="utf-8")
    return folder
