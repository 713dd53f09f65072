"""RedPajama-V2: documents joined with their signals and duplicates, row by row, or an error."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from reader_samples import reader_of, store, texts_of

from megatron_completedp.data.readers import ShardReader
from megatron_completedp.data.redpajama_v2 import DEFAULT_MAXIMUM, DEFAULT_MINIMUM, V2Filter
from megatron_completedp.errors import ConfigError, DataError

pyarrow = pytest.importorskip("pyarrow", reason="duplicates are Parquet files")
parquet = pytest.importorskip("pyarrow.parquet")

KEY = "2023-06/0000/en_head"

#: Signals of a plain English document: within every default bound.
GOOD: dict[str, float | None] = {
    "ccnet_nlines": 4.0,
    "rps_doc_word_count": 400.0,
    "rps_doc_mean_word_length": 4.8,
    "rps_doc_num_sentences": 20.0,
    "rps_doc_symbol_to_word_ratio": 0.0,
    "rps_doc_frac_no_alph_words": 0.1,
    "rps_doc_frac_lines_end_with_ellipsis": 0.0,
    **{f"rps_doc_frac_chars_top_{n}gram": 0.02 for n in (2, 3, 4)},
    **{f"rps_doc_frac_chars_dupe_{n}grams": 0.01 for n in range(5, 11)},
    "rps_doc_lorem_ipsum": 0.0,
    "rps_doc_ml_wikipedia_score": None,
}


class Shard:
    """The three files of one shard; each `write` replaces one, `read` reads them together."""

    def __init__(self, root: Path, key: str = KEY) -> None:
        self.key = key
        self.documents = root / f"documents/{key}.json.gz"
        self.signals = root / f"quality_signals/{key}.signals.json.gz"
        self.duplicates = root / f"duplicates/{key}.duplicates.parquet"

    def write_documents(self, lines: Sequence[bytes]) -> None:
        store(self.documents, b"".join(line + b"\n" for line in lines))

    def write_signals(self, rows: Sequence[Mapping[str, float | None]], **changes: Any) -> None:
        lines = [
            {
                "id": f"{self.key}.json.gz/{i}",
                "id_int": 7 + i,
                "metadata": {"language": "en"},
                "quality_signals": {
                    **{name: [[0, 99, score]] for name, score in row.items()},
                    "rps_lines_num_words": [[0, 50, 9], [50, 99, 8]],
                },
                **changes,
            }
            for i, row in enumerate(rows)
        ]
        store(self.signals, b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    def write_duplicates(self, *doc_ids: str) -> None:
        self.duplicates.parent.mkdir(parents=True, exist_ok=True)
        shard_ids = [f"{self.key}.json.gz"] * len(doc_ids)
        digests = ["sha1:x"] * len(doc_ids)
        names = ["shard_id", "doc_id", "digest"]
        strings = [pyarrow.array(values, "string") for values in (shard_ids, doc_ids, digests)]
        parquet.write_table(pyarrow.table(strings, names), self.duplicates)

    def read(self, rule: V2Filter | None = None) -> tuple[list[str], ShardReader]:
        reader = reader_of(self.documents, filter=rule or V2Filter())
        return texts_of(reader), reader


def document(text: str) -> bytes:
    """A row of documents with some of the keys it has beside the text."""
    row = {"url": "u", "digest": "sha1:x", "nlines": 4, "raw_content": text, "bucket": "head"}
    return json.dumps(row).encode()


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """Five good documents, named by their row; no duplicates."""
    shard = Shard(tmp_path)
    shard.write_documents([document(f"row {i}") for i in range(5)])
    shard.write_signals([GOOD] * 5)
    shard.write_duplicates()
    return shard


def test_good_documents_are_all_kept(shard: Shard) -> None:
    texts, reader = shard.read()
    assert texts == [f"row {i}" for i in range(5)]
    assert not reader.skipped
    assert reader.file.key == f"redpajama-v2/{KEY}"
    assert [(Path(file.url), file.sha256) for file in reader.inputs] == [
        (path, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in (shard.documents, shard.duplicates, shard.signals)
    ]


def test_a_document_goes_with_the_signals_and_the_duplicate_of_its_own_row(shard: Shard) -> None:
    few_words = {**GOOD, "rps_doc_word_count": 49.0}
    shard.write_signals([GOOD, few_words, GOOD, few_words, GOOD])
    shard.write_duplicates(f"{KEY}.json.gz/4", f"{KEY}.json.gz/3")
    texts, reader = shard.read()
    assert texts == ["row 0", "row 2"]
    # A document that two rules leave out is counted once.
    assert reader.skipped == {"filtered:rps_doc_word_count": 1, "duplicate": 2}
    # What is filtered out is no defect of the file.
    assert len(texts_of(ShardReader(reader.file, max_bad_fraction=0.0))) == 2

    texts, _ = shard.read(V2Filter(drop_duplicates=False))
    assert texts == ["row 0", "row 2", "row 4"]
    texts, reader = shard.read(V2Filter(minimum={}, maximum={}))
    assert texts == ["row 0", "row 1", "row 2"]
    assert [Path(file.url) for file in reader.inputs] == [shard.documents, shard.duplicates]


def test_bad_rows_keep_their_place_in_the_join(shard: Shard) -> None:
    good = [document(f"row {i}") for i in range(5)]
    shard.write_documents([good[0], b'{"raw_content": "torn', b"{}", good[3], document("")])
    shard.write_signals([GOOD, GOOD, GOOD, {**GOOD, "rps_doc_lorem_ipsum": 0.1}, GOOD])
    texts, reader = shard.read()
    assert texts == ["row 0"]
    assert reader.skipped == {
        "torn_json": 1,
        "no_text": 1,
        "filtered:rps_doc_lorem_ipsum": 1,
        "empty_text": 1,
    }


@pytest.mark.parametrize("name", [*DEFAULT_MINIMUM])
def test_each_default_minimum_is_the_least_that_is_kept(shard: Shard, name: str) -> None:
    bound = DEFAULT_MINIMUM[name]
    shard.write_signals([{**GOOD, name: value} for value in (bound, bound - 1e-6, -1, None, 5e4)])
    texts, _ = shard.read(V2Filter(maximum={}))
    assert texts == ["row 0", "row 4"]


@pytest.mark.parametrize("name", [*DEFAULT_MAXIMUM])
def test_each_default_maximum_is_the_most_that_is_kept(shard: Shard, name: str) -> None:
    bound = DEFAULT_MAXIMUM[name]
    shard.write_signals(
        [{**GOOD, name: value} for value in (bound, bound + 1e-6, 1e9, None, bound)]
    )
    texts, reader = shard.read()
    assert texts == ["row 0", "row 4"]
    assert reader.skipped == {f"filtered:{name}": 3}


def test_any_signal_of_a_document_can_be_bounded(shard: Shard) -> None:
    shard.write_signals([{"my_score": value} for value in (0.1, 0.5, 0.9, None, 0.5)])
    texts, reader = shard.read(V2Filter(minimum={"my_score": 0.2}, maximum={"my_score": 0.6}))
    assert texts == ["row 1", "row 4"]
    assert reader.skipped == {"filtered:my_score": 3}


def test_a_signal_that_the_file_lacks_is_named_with_those_it_has(shard: Shard) -> None:
    shard.write_signals([{"ccnet_nlines": 1.0}] * 5)
    with pytest.raises(DataError, match=r"json\.gz:1 has no signal 'wordcount'.*has ccnet_nlines"):
        shard.read(V2Filter(minimum={"wordcount": 1}))


@pytest.mark.parametrize("spans", [0.5, [0.5], [[0, 99]], [[0, 99, "high"]], {"a": 1}])
def test_a_signal_of_another_shape_is_named(shard: Shard, spans: Any) -> None:
    shard.write_signals([GOOD] * 5, quality_signals={"score": spans})
    with pytest.raises(DataError, match=r"json\.gz:1: signal 'score' is .*expected \[\[start"):
        shard.read(V2Filter(minimum={"score": 0}, maximum={}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "2023-06/0001/en_head.json.gz/0"}, r"is about '2023-06/0001/en_head.json.gz/0'"),
        ({"id": f"{KEY}.json.gz/1"}, rf"row 1; expected an object with the id '{KEY}.json.gz/0'"),
        ({"id": None}, "is about None in row 1"),
        ({"quality_signals": None}, "and quality_signals"),
    ],
)
def test_signals_of_other_documents_are_refused(
    shard: Shard, changes: dict[str, Any], message: str
) -> None:
    shard.write_signals([GOOD] * 5, **changes)
    with pytest.raises(DataError, match=message):
        shard.read()


def test_files_of_other_lengths_are_refused(shard: Shard) -> None:
    shard.write_signals([GOOD] * 4)
    with pytest.raises(DataError, match=r"has 4 rows; the documents have more"):
        shard.read()
    shard.write_signals([GOOD] * 6)
    with pytest.raises(DataError, match=r"has a row 6; the documents end before it"):
        shard.read()


def test_damaged_companions_are_errors_never_skips(shard: Shard) -> None:
    whole = shard.signals.read_bytes()
    shard.signals.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"signals\.json\.gz: the compressed stream is truncated"):
        shard.read()
    for line, message in ((b'{"id": ', "not JSON"), (b"[]", "expected an object, found list")):
        store(shard.signals, line)
        with pytest.raises(DataError, match=rf"signals\.json\.gz:1: {message}"):
            shard.read()
    shard.write_signals([GOOD] * 5)

    for doc_id in ("2023-06/0001/en_head.json.gz/0", f"{KEY}.json.gz/", f"{KEY}.json.gz/-1"):
        shard.write_duplicates(doc_id)
        with pytest.raises(DataError, match=rf"lists '{doc_id}'; expected {KEY}\.json\.gz/<row>"):
            shard.read()
    shard.duplicates.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"duplicates\.parquet is not a whole Parquet file"):
        shard.read()


def test_missing_companions_are_named_unless_allowed(shard: Shard) -> None:
    shard.signals.unlink()
    with pytest.raises(DataError, match=r"signals\.json\.gz does not exist.*filter.allow_unrated"):
        shard.read()
    shard.write_duplicates(f"{KEY}.json.gz/0")
    texts, _ = shard.read(V2Filter(allow_unrated=True))
    assert len(texts) == 4  # what is there still counts
    shard.write_signals([GOOD] * 5)
    shard.duplicates.unlink()
    with pytest.raises(DataError, match=r"duplicates\.parquet does not exist"):
        shard.read()
    texts, _ = shard.read(V2Filter(drop_duplicates=False))
    assert len(texts) == 5


def test_tail_is_read_as_it_is_when_allowed(tmp_path: Path) -> None:
    tail = Shard(tmp_path, "2023-06/0000/en_tail")
    tail.write_documents([document("one"), document("two")])
    texts, reader = tail.read(V2Filter(allow_unrated=True))
    assert texts == ["one", "two"]
    assert len(reader.inputs) == 1


def test_the_default_keeps_the_published_rules() -> None:
    """Transcribed a second time, from the papers' tables: Gopher A1, C4 section 2.2."""
    rule = V2Filter()
    assert (rule.minimum["rps_doc_word_count"], rule.maximum["rps_doc_word_count"]) == (50, 100000)
    shares = {2: 0.20, 3: 0.18, 4: 0.16, 5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    for n, share in shares.items():
        kind = f"top_{n}gram" if n < 5 else f"dupe_{n}grams"
        assert rule.maximum[f"rps_doc_frac_chars_{kind}"] == share
    assert rule.drop_duplicates
    assert not rule.allow_unrated


def test_bounds_that_contradict_or_cannot_apply_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"bounds of a are 2 to 1; expected minimum <= maximum"):
        V2Filter(minimum={"a": 2}, maximum={"a": 1})
    with pytest.raises(ConfigError, match="bounds of a are nan"):
        V2Filter(minimum={"a": float("nan")})
    with pytest.raises(ConfigError, match=r"rps_lines_num_words, which has a value for each line"):
        V2Filter(maximum={"rps_lines_num_words": 1})


def test_a_filter_from_a_loaded_config_reaches_other_processes() -> None:
    rule = V2Filter(minimum=MappingProxyType({"a": 1.0}), maximum=MappingProxyType({}))
    assert pickle.loads(pickle.dumps(rule)) == rule
