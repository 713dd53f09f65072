"""gigatoken, where its ids are those of the tokenizer's own library.

It encodes some twenty times as fast as `tokenizers` and `sentencepiece`. Where it may be used was
found by comparing gigatoken 0.10.0 with tokenizers 0.23.3 and sentencepiece 0.2.3 on strings of
words, code, white space, scripts, combining marks, emoji, control characters and near misses of
control tokens. So many were encoded differently, each for the reason given:

    byte-level BPE without normalizer (GPT-2, and GPT-4's split)   0 of 56,000
    byte-level BPE with NFC (GPT-NeoX)         159 of 20,000  marks newer than Unicode 9
        without combining marks                  0 of 30,000
    SentencePiece BPE (Mistral, our own)        44 of 40,000  a literal <s>, </s> or other control
                                                              token becomes its id
    SentencePiece with user-defined pieces   2,382 of  6,000  they are matched first
    SentencePiece without extra white space  1,043 of  6,000  spaces alone are removed
    SentencePiece with nmt_nfkc                531 of  6,000  marks after characters it replaces
    added tokens that are single words, or       702 of  6,000  these settings are not read
        strip spaces

Apart from these, 209,547 single code points in three surroundings each, a megabyte of one character
or of none that repeats, and 10 MB of prose in one document gave equal ids. So documents with the
first two reasons are found one by one, and tokenizers of the kinds below them, or of any kind that
was not compared, are left to their own library. A probe guards against other versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np

from megatron_completedp.data.tokenizer import HuggingFaceTokenizer, Tokenizer

logger = logging.getLogger(__name__)

#: Where gigatoken's NFC is not that of `tokenizers`, which takes what came after Unicode 9 for
#: unassigned: marks with a combining class, which change places with others, and characters that
#: compose. Whole blocks beyond the Basic Multilingual Plane, all of rare scripts.
NEWER_MARKS = (
    (0x07FD, 0x07FD),
    (0x0897, 0x089F),
    (0x08CA, 0x08D3),
    (0x09FE, 0x09FE),
    (0x0C3C, 0x0C3C),
    (0x0D3B, 0x0D3C),
    (0x0EBA, 0x0EBA),
    (0x1715, 0x1715),
    (0x1ABF, 0x1AFF),
    (0x1DF6, 0x1DFA),
    (0xA82C, 0xA82C),
    (0x10500, 0x16FFF),
    (0x1E000, 0x1E8FF),
)

_SPACES = " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2009\u200b\u2028\u202f\u3000\u2581\ufeff"
#: Short texts of everything that a tokenizer may treat in a way of its own.
PROBE_TEXTS = (
    "",
    "The quick Brown fox's tail can't; I'll, WE'VE, you'D 'S. Isn\u2019t it?\n\n  Yes:\t42!\r\n",
    "def f(x):\n    return x['a'] + 0x1F  # 3.14, 1,000,000\n\n\n\tif (a && b) { s = \"\\n\"; }",
    "https://example.org/a_b?c=%20&d=1#e <br/> $\\frac{1}{2}$ ~~~ --- ... === @user #tag C++",
    "caf\u00e9 cafe\u0301 \u00c5 \u212b \ufb01 \ufb00\u06d7 \u00bd\u0301 \u017f\u032f \u2167",
    "\u0395\u03bb\u03bb\u03ac\u03b4\u03b1 \u041c\u043e\u0441\u043a\u0432\u0430 \u05e9\u05b8\u05dc"
    "\u05d5\u05b9\u05dd \u0645\u064e\u0631\u0652\u062d\u0628\u0627 \u0928\u0938\u094d\u0924\u0947",
    "\u4e2d\u6587\u3002\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u1112\u1161\u11ab \u0e44\u0e17\u0e22",
    "\U0001f600\U0001f44d\U0001f3fd\U0001f469\u200d\U0001f680 1\ufe0f\u20e3 \U0001d538 \U00020000",
    "a\0b\x01\x7f\ufffd\ufffe\ue000\U0010ffff",
    *(f"{space}a{space}{space}b {space} c{space}" for space in _SPACES),
    *(space * 3 for space in _SPACES),
    *("a" + " " * count + "b" for count in (2, 3, 4, 7, 8, 15, 16, 24, 25, 31, 64)),
    "supercalifragilistic" * 20,
    "0123456789" * 10,
)


class FastEngine:
    """gigatoken for one tokenizer; made by `load_fast_engine`."""

    def __init__(self, backend: Any, differs: TextFinder) -> None:
        self._backend = backend
        self.name = f"gigatoken {importlib.metadata.version('gigatoken')}"
        self.differs = differs
        """Finds the texts that the tokenizer's own library must encode."""

    def encode(self, data: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, given in UTF-8, back to back (uint32), and the length of each."""
        # The arrays behind the list of lists, as they are; one thread.
        layout = self._backend.encode_batch(data, parallel=False).layout
        return layout.content.data, np.diff(layout.offsets.data)

    def encode_one(self, data: bytes) -> np.ndarray:
        """The ids of one text (uint32), without the half millisecond that a batch costs."""
        ids: np.ndarray = self._backend.encode(data)
        return ids


class Utf8Texts:
    """Texts, each of them in UTF-8, and all of them in one string to search in."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.data = [text.encode() for text in texts]
        self.joined = b"".join(self.data)
        self.ends = list(accumulate(map(len, self.data)))
        """Where each text ends in `joined`."""


class TextFinder:
    """Tells which texts hold a match of a pattern.

    They are searched together for the bytes that a match can begin with, which is many times as
    fast as the pattern, or as any search one by one, and settles most texts.
    """

    def __init__(self, pattern: str, beginnings: Iterable[str]) -> None:
        """`beginnings`: characters or longer strings with the first bytes of every match."""
        self._bytes = sorted({beginning.encode()[:1] for beginning in beginnings})
        self._pattern = re.compile(pattern)

    def find(self, batch: Utf8Texts) -> list[int]:
        """The numbers of the texts that hold a match, in ascending order."""
        found = set()
        for byte in self._bytes:
            place = batch.joined.find(byte)
            while place >= 0:
                number = bisect_right(batch.ends, place)
                if self._pattern.search(batch.texts[number]):
                    found.add(number)
                place = batch.joined.find(byte, batch.ends[number])
        return sorted(found)


def find_literals(literals: Sequence[str]) -> TextFinder:
    """Finds the texts that hold one of `literals`; none if there are none."""
    return TextFinder("|".join(map(re.escape, literals)), literals)


def load_fast_engine(tokenizer: Tokenizer) -> FastEngine | None:
    """An engine for `tokenizer`; None, with the reason in the log, where none can be trusted."""
    try:
        engine, added = _load(tokenizer)
    except ImportError:
        reason = "gigatoken is not installed (pip install gigatoken)"
    except (ValueError, RuntimeError) as error:
        reason = f"gigatoken does not suit it ({str(error).strip().splitlines()[0]})"
    else:
        in_text = [f"a{token} {token}b{token}{token} {token}" for token in added]
        if same_ids(engine, tokenizer, [*PROBE_TEXTS, *in_text]):
            return engine
        reason = "gigatoken encodes the probe differently"
    logger.warning(
        "%s is left to %s, some twenty times slower: %s",
        tokenizer.path,
        tokenizer.reference_library,
        reason,
    )
    return None


def same_ids(engine: FastEngine, tokenizer: Tokenizer, texts: Sequence[str]) -> bool:
    """Whether both encode `texts` alike."""
    ours = [engine.encode_one(text.encode()).tolist() for text in texts]
    return ours == tokenizer.encode_batch(texts)


def _load(tokenizer: Tokenizer) -> tuple[FastEngine, list[str]]:
    """The engine, and the tokens that it finds in a text before all others.

    Raises ValueError or RuntimeError for a kind of tokenizer that it is not to be used for.
    """
    import gigatoken

    if isinstance(tokenizer, HuggingFaceTokenizer):
        config = json.loads(tokenizer.content)
        differs = _check_byte_level(config)
        backend = gigatoken.Tokenizer.from_json(tokenizer.content)
        return FastEngine(backend, differs), [token["content"] for token in _added_tokens(config)]
    backend = gigatoken.Tokenizer.from_sentencepiece(tokenizer.content)
    added = set(backend.as_hf().get_added_vocab())
    if user_defined := added.difference(tokenizer.control_literals):
        raise ValueError(f"user-defined pieces {sorted(user_defined)[:5]}")
    # A control token that is spelt in a text becomes its id, and so might a byte's piece, <0x0A>.
    return FastEngine(backend, find_literals([*tokenizer.control_literals, "<0x"])), []


def _added_tokens(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    return config.get("added_tokens") or []


def _check_byte_level(config: Mapping[str, Any]) -> TextFinder:
    """Finds the texts that differ under a tokenizer.json; ValueError for kinds not compared."""
    model, normalizer = config["model"], config.get("normalizer")
    # Files by older versions lack the type.
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise ValueError("its model is not byte-level BPE, or has dropout")
    for token in _added_tokens(config):
        if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            raise ValueError(f"its token {token['content']!r} has single_word, lstrip or rstrip")
    if normalizer is None:
        return find_literals([])
    if normalizer["type"] != "NFC":
        raise ValueError(f"its normalizer is {normalizer['type']}")
    ranges = [(chr(first), chr(last)) for first, last in NEWER_MARKS]
    pattern = "".join(f"{first}-{last}" for first, last in ranges)
    return TextFinder(f"[{pattern}]", [*chain(*ranges)])
