"""RedPajama-V2: which documents of a shard to keep, by its quality signals and duplicates.

A shard is one key, `<snapshot>/<shard>/<language>_<bucket>`, under four folders of one root:

    documents/KEY.json.gz                        the text, one row per document
    quality_signals/KEY.signals.json.gz          the same rows: {"id": "KEY.json.gz/ROW", ...}
    duplicates/KEY.duplicates.parquet            the `doc_id`s of what exact deduplication drops
    minhash/KEY.minhash.parquet                  not read

The bucket is head, middle or tail; tail has documents alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from megatron_completedp.data.parquet import read_strings
from megatron_completedp.data.rows import split_lines
from megatron_completedp.data.streams import InputFile, StoredFile, open_filesystem, read_blocks
from megatron_completedp.errors import ConfigError, DataError

_DOCUMENTS = re.compile(
    r"(?P<root>.*?)documents/(?P<key>\d{4}-\d{2}/\d+/[a-z]{2}_(?P<bucket>head|middle|tail))"
    r"\.json\.gz"
)

#: Rae et al. 2021 (Gopher), appendix A1.1: at least these words, of at least this mean length;
#: Raffel et al. 2020 (C4), section 2.2: at least three sentences.
DEFAULT_MINIMUM = {
    "rps_doc_word_count": 50.0,
    "rps_doc_mean_word_length": 3.0,
    "rps_doc_num_sentences": 3.0,
}

#: The same sections: length, symbols, words without a letter and lines cut short; then Gopher's
#: repetitions (table A1), as the share of characters in the most frequent n-gram for n of 2 to 4
#: and in all repeated ones for n of 5 to 10; then C4's placeholder text.
DEFAULT_MAXIMUM = {
    "rps_doc_word_count": 100_000.0,
    "rps_doc_mean_word_length": 10.0,
    "rps_doc_symbol_to_word_ratio": 0.1,
    "rps_doc_frac_no_alph_words": 0.2,
    "rps_doc_frac_lines_end_with_ellipsis": 0.3,
    "rps_doc_frac_chars_top_2gram": 0.20,
    "rps_doc_frac_chars_top_3gram": 0.18,
    "rps_doc_frac_chars_top_4gram": 0.16,
    "rps_doc_frac_chars_dupe_5grams": 0.15,
    "rps_doc_frac_chars_dupe_6grams": 0.14,
    "rps_doc_frac_chars_dupe_7grams": 0.13,
    "rps_doc_frac_chars_dupe_8grams": 0.12,
    "rps_doc_frac_chars_dupe_9grams": 0.11,
    "rps_doc_frac_chars_dupe_10grams": 0.10,
    "rps_doc_lorem_ipsum": 0.0,
}


@dataclass(frozen=True, kw_only=True)
class V2Filter:
    """Which documents of RedPajama-V2 are kept: those within every bound that are no duplicate.

    The default bounds are the Gopher rules (Rae et al. 2021) and C4 rules (Raffel et al. 2020)
    that the published signals of a document express; bounds that are given replace all of them.
    A document whose signal is null, not computed for it, is not kept.
    """

    minimum: Mapping[str, float] = field(default_factory=DEFAULT_MINIMUM.copy)
    """Signal of a document to its smallest allowed value."""
    maximum: Mapping[str, float] = field(default_factory=DEFAULT_MAXIMUM.copy)
    """Signal of a document to its largest allowed value."""
    drop_duplicates: bool = True
    """Leave out what the published exact deduplication lists."""
    allow_unrated: bool = False
    """Read shards whose signals or duplicates do not exist, unfiltered: tail, and a few others."""

    def __post_init__(self) -> None:
        for name in self.signals:
            low, high = self.minimum.get(name, -math.inf), self.maximum.get(name, math.inf)
            if not low <= high:  # also false for NaN
                raise ConfigError(
                    f"filter bounds of {name} are {low} to {high}; expected minimum <= maximum."
                )
            if name.startswith("rps_lines_"):
                raise ConfigError(
                    f"filter names {name}, which has a value for each line; bounds are for signals "
                    "of a document, rps_doc_* and ccnet_*. Remove it."
                )

    def __getstate__(self) -> dict[str, Any]:
        """What pickle keeps: plain dicts, for the read-only views of a loaded config do not."""
        return {**vars(self), "minimum": dict(self.minimum), "maximum": dict(self.maximum)}

    @property
    def signals(self) -> list[str]:
        """The signals with a bound, in the order in which they are looked at."""
        return list(dict.fromkeys([*self.minimum, *self.maximum]))

    def failed_signal(self, values: Mapping[str, Any], place: str) -> str:
        """The first signal that rules the document out; empty to keep it.

        `values` is the document's `quality_signals`: name to [[start, end, score or null], ...],
        one span for the whole document. Raises DataError for a signal that it lacks or that
        is of another shape.
        """
        for name in self.signals:
            if name not in values:
                raise DataError(
                    f"{place} has no signal {name!r}, which the filter bounds; it has "
                    f"{', '.join(sorted(values))}. Correct `filter`."
                )
            low, high = self.minimum.get(name, -math.inf), self.maximum.get(name, math.inf)
            try:
                score = values[name][0][2] if values[name] else None
                kept = score is not None and low <= score <= high
            except (TypeError, LookupError) as error:
                raise DataError(
                    f"{place}: signal {name!r} is {values[name]!r}; expected [[start, end, score]]."
                    " Fetch the file again."
                ) from error
            if not kept:
                return name
        return ""


def document_key(url: str) -> str | None:
    """KEY if `url` is a RedPajama-V2 file of documents, else None."""
    match = _DOCUMENTS.fullmatch(url)
    return match["key"] if match else None


def is_tail(key: str) -> bool:
    """Whether the shard is of the bucket that was published without signals and duplicates."""
    return key.endswith("_tail")


class Companions:
    """Verdicts on the documents of one shard, in row order; `inputs` are the files behind them."""

    def __init__(self, url: str, rule: V2Filter) -> None:
        """Raises DataError when `url` is no file of documents or its companions do not exist."""
        match = _DOCUMENTS.fullmatch(url)
        if match is None:
            raise DataError(
                f"{url} is not in the layout of RedPajama-V2; expected ROOT/documents/<snapshot>/"
                "<shard>/<language>_<bucket>.json.gz. Correct the path or the format."
            )
        self._root, self._key = match["root"], match["key"]
        self._rule = rule
        self._row = 0
        self.inputs: list[InputFile] = []
        self._duplicates = self._read_duplicates() if rule.drop_duplicates else frozenset()
        self._signals_url = f"{self._root}quality_signals/{self._key}.signals.json.gz"
        rated = bool(rule.signals) and self._exists(self._signals_url)
        self._signals = self._read_signals() if rated else None

    def verdict(self) -> str:
        """Why the next document is left out: `duplicate` or `filtered:<signal>`; empty to keep it.

        To be called once for each row of documents, also for bad rows. Raises DataError when the
        signals are not those of this row.
        """
        row, self._row = self._row, self._row + 1
        failed = self._failed_signal(row) if self._signals else ""
        if row in self._duplicates:
            return "duplicate"
        return f"filtered:{failed}" if failed else ""

    def finish(self) -> None:
        """To be called after the last document; DataError if there are signals for more."""
        if self._signals and next(self._signals, None) is not None:
            raise self._mismatch(f"has a row {self._row + 1}; the documents end before it")

    def _failed_signal(self, row: int) -> str:
        assert self._signals is not None
        rated = next(self._signals, None)
        if rated is None:
            raise self._mismatch(f"has {row} rows; the documents have more")
        expected = f"{self._key}.json.gz/{row}"
        if rated.get("id") != expected or not isinstance(rated.get("quality_signals"), dict):
            raise self._mismatch(
                f"is about {rated.get('id')!r} in row {row + 1}; expected an object with the id "
                f"{expected!r} and quality_signals"
            )
        return self._rule.failed_signal(rated["quality_signals"], f"{self._signals_url}:{row + 1}")

    def _read_signals(self) -> Iterator[dict[str, Any]]:
        with StoredFile(self._signals_url) as stored:
            for number, line in enumerate(split_lines(read_blocks(stored)), start=1):
                yield _parse_signals(line, f"{self._signals_url}:{number}")
            self.inputs.append(stored.record())

    def _read_duplicates(self) -> frozenset[int]:
        """The rows, counted from 0, that exact deduplication drops."""
        url = f"{self._root}duplicates/{self._key}.duplicates.parquet"
        if not self._exists(url):
            return frozenset()
        prefix, rows = f"{self._key}.json.gz/", set()
        for doc_id in read_strings(url, "doc_id", self.inputs):
            row = str(doc_id).removeprefix(prefix)
            if not row.isdecimal():
                raise DataError(
                    f"{url} lists {doc_id!r}; expected {prefix}<row>. It belongs to another file "
                    "of documents: fetch both again."
                )
            rows.add(int(row))
        return frozenset(rows)

    def _exists(self, url: str) -> bool:
        """Whether the companion is there; DataError if it is not and has to be."""
        if is_tail(self._key):
            found = False
        else:
            fs, path = open_filesystem(url)
            found = fs.exists(path)
        if not found and not self._rule.allow_unrated:
            raise DataError(
                f"{url} does not exist, so its documents cannot be filtered. Fetch it, or set "
                "filter.allow_unrated to read them as they are."
            )
        return found

    def _mismatch(self, problem: str) -> DataError:
        return DataError(
            f"{self._signals_url} {problem}. Documents and signals are not of one download: fetch "
            "both again."
        )


def _parse_signals(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error}). Fetch the file again.") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object, found {type(row).__name__}.")
    return row
