"""Texts of everything that tokenizers are known to treat in ways of their own."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator

WORDS = [
    *("the", "quick", "Brown", "fox's", "can't", "I'll", "we'VE", "'S", "'\u017f", "Isn\u2019t"),
    *("x=1", "12", "3456", "007", "\u00bd", "\u00b2", "\u2167", "$3.50", "foo_bar", "na\u00efve"),
    *("https://x.y/z?a=b", "...", "---", "===", "#include", "\\frac{a}{b}", "~!@#$%^&*()", "<br/>"),
    *("</", "<0x", "<|end", "\u2581", "\u2581\u2581", "\u0120", "\u010a", "\u00dcber", ""),
]
SPACES = [*" \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2000\u2009\u200b\u2028\u202f\u3000\ufeff"]
RUNS = [" " * count for count in range(2, 60)]
EMOJI = [*"\U0001f600\U0001f44d\U0001f3fd\u2764\ufe0f\u200d\U0001f469\U0001f680\U0001f1e9"]
ODD = [*"\0\x01\x7f\u00ad\u200e\ue000\ufffd\ufffe\uffff\U0010ffff"]
SCRIPTS = [chr(c) for c in (*range(0x370, 0x700), *range(0x900, 0x980), *range(0xE00, 0xE80))]
EAST_ASIAN = [chr(c) for c in (*range(0x3040, 0x3100), *range(0x4E00, 0x4E80))]
HANGUL = [chr(c) for c in (*range(0x1100, 0x1200), *range(0xAC00, 0xAC80))]
LATIN = [chr(c) for c in range(0xC0, 0x250)]
#: By this Python's Unicode: some of them are newer than what the libraries know, which is meant.
MARKS = [chr(c) for c in range(0x20000) if unicodedata.combining(chr(c))]
DECOMPOSABLE = [chr(c) for c in range(0x30000) if unicodedata.decomposition(chr(c))]
CONTROL = ["<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<|endoftext|>", "<|padding|>"]

KINDS = (
    (WORDS, 10), ([" "], 8), (SPACES, 4), (MARKS, 3), (LATIN, 3), (RUNS, 2), (EMOJI, 2),
    (EAST_ASIAN, 2), (SCRIPTS, 2), (HANGUL, 1), (DECOMPOSABLE, 1), (ODD, 1), (CONTROL, 0.2),
)  # fmt: skip


def fuzz_texts(count: int, *, seed: int) -> Iterator[str]:
    """`count` valid texts of 0 to 100 parts; one in fifty begins with one character very often."""
    rng = random.Random(seed)
    kinds, weights = zip(*KINDS, strict=True)
    for _ in range(count):
        parts = rng.choices(kinds, weights, k=rng.choice([0, 1, 2, 3, 5, 10, 30, 100]))
        text = "".join(rng.choice(kind) for kind in parts)
        if rng.random() < 0.02:
            text = rng.choice("a\u00e9\u3042 \n\U0001f600!1\0") * rng.choice([100, 5000]) + text
        yield text
