"""One shard to texts: every document once, in order; every other row counted; no cut stream."""

from __future__ import annotations

import codecs
import hashlib
import json
import random
import struct
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from reader_samples import pack, reader_of, rows, store, texts_of

from megatron_completedp.data import readers
from megatron_completedp.data import rows as row_rules
from megatron_completedp.data.layout import Format
from megatron_completedp.data.readers import ShardReader
from megatron_completedp.data.rows import split_lines
from megatron_completedp.errors import ConfigError, DataError

STORED_AS = ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz"]

#: Rows as the subsets of RedPajama have them, and what else a reader has to take.
REAL_ROWS = [
    b'{"text": "wiki", "meta": {"title": "A", "url": "u", "language": "en"}}',
    b'{"meta": {"short_book_title": "B", "publication_date": 1}, "text": "book"}',
    b'{"text": "sample", "meta": "{\'url\': \'u\'}", "red_pajama_subset": "c4"}',
    b'{"pred_label": "__label__cc", "pred_label_prob": NaN, "text": "flat", "source": "cc/1"}',
    b'{"text": "escapes \\u00e9 \\ud83d\\ude00 \\u0000", "meta": {}}',
    '{"text": "caf\u00e9 \u4e16 \U0001f600"}'.encode(),
    b'  {"text": " blanks around "}  ',
]
REAL_TEXTS = [
    "wiki",
    "book",
    "sample",
    "flat",
    "escapes \u00e9 \U0001f600 \x00",
    "caf\u00e9 \u4e16 \U0001f600",
    " blanks around ",
]


@pytest.mark.parametrize("name", STORED_AS)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("end", [True, False], ids=["newline", "no newline"])
def test_rows_as_they_really_are(tmp_path: Path, name: str, newline: bytes, end: bool) -> None:
    content = newline.join(REAL_ROWS) + newline * end
    path = store(tmp_path / name, content)
    reader = reader_of(path)
    batches = list(reader)
    assert texts_of(batches) == REAL_TEXTS
    assert reader.rows == len(REAL_ROWS)
    assert not reader.skipped
    # One newline is counted for each line, also where the last one lacks it.
    assert sum(batch.bytes_read for batch in batches) == len(content) + (not end)
    [file] = reader.inputs
    stored = path.read_bytes()
    assert (file.url, file.bytes) == (str(path), len(stored))
    assert file.sha256 == hashlib.sha256(stored).hexdigest()


def test_blank_lines_are_no_rows_and_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    content = codecs.BOM_UTF8 + rows("a") + b"\n \t\r\n" + rows("b") + b"\n"
    reader = reader_of(store(tmp_path / "a.jsonl", content))
    assert texts_of(reader) == ["a", "b"]
    assert reader.rows == 2
    assert not reader.skipped
    # Anywhere else it is what it is: no JSON.
    reader = reader_of(store(tmp_path / "b.jsonl", rows("a") + codecs.BOM_UTF8 + rows("b")))
    assert texts_of(reader) == ["a"]
    assert reader.skipped == {"torn_json": 1}


@given(
    st.lists(st.sampled_from([b"\n", b"ab", b"c", b"\r", b"\xef\xbb\xbf", b"\xef", b""])),
)
def test_lines_do_not_depend_on_where_the_blocks_end(blocks: list[bytes]) -> None:
    expected = b"".join(blocks).removeprefix(codecs.BOM_UTF8).split(b"\n")
    # What follows the last newline is a line only if there is something.
    assert list(split_lines(blocks)) == expected[: -1 if expected[-1] == b"" else None]


BAD = {
    "torn_json": [
        b'{"text": "torn',
        b'{"text": "a\x01b"}',
        b"{'text': 'python'}",
        b"not json",
        b'{"text": "\xe4\xbd',  # the file ends inside a character
        b"[" * 100_000,
        b'{"text": "a", "n": ' + b"9" * 5000 + b"}x",
    ],
    "not_an_object": [b'["text"]', b'"text"', b"1", b"null"],
    "no_text": [b'{"raw_content": "x"}', b"{}", b'{"meta": {"text": "x"}}'],
    "text_not_string": [b'{"text": null}', b'{"text": 1}', b'{"text": ["a"]}', b'{"text": {}}'],
    "invalid_utf8": [b'{"text": "caf\xe9"}', b'{"text": "\xed\xa0\x80"}', b'{"text": "\xc0\xaf"}'],
    "empty_text": [b'{"text": ""}'],
}


@pytest.mark.parametrize(
    ("reason", "line"), [(reason, line) for reason, lines in BAD.items() for line in lines]
)
def test_a_bad_row_is_counted_by_its_reason(tmp_path: Path, reason: str, line: bytes) -> None:
    content = rows("first") + b"\n" + line + b"\n" + rows("last")
    path = store(tmp_path / "a.jsonl", content)
    reader = reader_of(path)
    assert texts_of(reader) == ["first", "last"]
    assert reader.skipped == {reason: 1}
    assert reader.rows == 3
    # As the last line without a newline, where a download ended, it is the same.
    reader = reader_of(store(tmp_path / "b.jsonl", rows("first") + line))
    assert texts_of(reader) == ["first"]
    assert reader.skipped == {reason: 1}
    # By default one row in three is too many; an empty text is no defect.
    reader = reader_of(path, max_bad_fraction=0.01)
    if reason == "empty_text":
        assert texts_of(reader) == ["first", "last"]
    else:
        with pytest.raises(DataError, match=rf"a\.jsonl: 1 of 3 .*a\.jsonl:3 \({reason}: "):
            list(reader)


def test_bad_rows_are_allowed_up_to_the_limit_and_no_further(tmp_path: Path) -> None:
    path = store(tmp_path / "a.jsonl", rows(*"abcdefgh") + b'{"text": 1}\n{"text": 2}\n')
    reader = reader_of(path, max_bad_fraction=0.2)
    assert len(texts_of(reader)) == 8
    assert reader.skipped == {"text_not_string": 2}
    with pytest.raises(DataError, match=r"2 of 10 rows \(20.00%\).* more than the 19.00%"):
        list(reader_of(path, max_bad_fraction=0.19))
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="max_bad_fraction is"):
            reader_of(path, max_bad_fraction=fraction)


def test_a_wrong_field_is_named(tmp_path: Path) -> None:
    path = store(tmp_path / "a.jsonl", rows("x"))
    with pytest.raises(DataError, match=r"a\.jsonl:1 \(no_text: .*field read is 'body'"):
        list(reader_of(path, max_bad_fraction=0.01, field="body"))


def test_other_encodings_end_in_an_error(tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-16-be", "utf-32"):
        path = store(tmp_path / "a.jsonl", rows("x", "y").decode().encode(encoding))
        with pytest.raises(DataError, match=r"cannot be used.*a\.jsonl:1 \(torn_json"):
            list(reader_of(path, max_bad_fraction=0.5))


def test_lone_surrogates_are_replaced_and_counted(tmp_path: Path) -> None:
    lines = [
        b'{"text": "high \\ud800 low \\udc00 pair \\ud83d\\ude00"}',
        b'{"text": "swapped \\udc00\\ud800", "n": 1}',
        b'{"text": "elsewhere", "meta": "\\ud800"}',
        b'{"text": "plain"}',
    ]
    reader = reader_of(store(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert texts_of(reader) == [
        "high \ufffd low \ufffd pair \U0001f600",
        "swapped \ufffd\ufffd",
        "elsewhere",
        "plain",
    ]
    assert reader.repaired_documents == 2  # the third has its surrogate outside the text
    assert not reader.skipped


@pytest.mark.parametrize("name", STORED_AS)
def test_an_empty_file_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name} is empty; it may be a failed download"):
        list(reader_of(path))
    with pytest.raises(DataError, match=rf"{name} has no row"):
        list(reader_of(store(path, b"\n\n")))


def test_a_file_that_goes_missing_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = store(tmp_path / "a.jsonl", rows("x"))
    reader = reader_of(path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl does not exist"):
        list(reader)
    path.mkdir()
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read at byte 0 \(IsADirectoryError"):
        list(ShardReader(reader.file))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz"])
def test_a_stream_cut_anywhere_is_an_error(tmp_path: Path, name: str) -> None:
    """Also where the rows so far are whole: nothing but the stream's own end ends it."""
    whole = pack(name, rows(*(f"text {i} {i * 7919}" for i in range(200))))
    path = tmp_path / name
    # A gzip file of one byte is not known to be one.
    for size in [*range(2, 40), len(whole) // 2, *range(len(whole) - 12, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"{name}: the compressed stream is truncated, {size}"):
            list(reader_of(path))
    # The second frame or member is held to the same.
    path.write_bytes(whole + whole[: len(whole) // 2])
    with pytest.raises(DataError, match="truncated"):
        list(reader_of(path))
    path.write_bytes(whole)
    assert len(texts_of(reader_of(path))) == 200


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz"])
def test_a_corrupt_stream_is_an_error(tmp_path: Path, name: str) -> None:
    whole = pack(name, rows(*(f"text {i} {i * 7919}" for i in range(200))))
    path = tmp_path / name
    # No magic number; a wrong one after a whole frame; a block that does not decode.
    broken = [rows("plain"), whole + b"rubbish", whole[:20] + b"\xff" * 40 + whole[60:]]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: the compressed stream is corrupt \("):
            list(reader_of(path))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz"])
def test_frames_and_members_follow_each_other(tmp_path: Path, name: str) -> None:
    """As parallel compressors and `cat` write them; a line may span two."""
    content = rows("one", "two", "three")
    parts = [pack(name, part) for part in (content[:20], b"", content[20:])]
    skippable = struct.pack("<II", 0x184D2A50, 5) + b"notes"
    path = tmp_path / name
    path.write_bytes((skippable if name.endswith(".zst") else b"").join(parts))
    assert texts_of(reader_of(path)) == ["one", "two", "three"]


def test_a_corrupt_checksum_is_an_error(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    stream = bytearray(compressor.compress(rows("x")))
    stream[-1] ^= 1
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(stream)
    with pytest.raises(DataError, match="is corrupt"):
        list(reader_of(path))


@pytest.mark.parametrize("name", STORED_AS)
def test_batches_are_bounded_and_lose_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BATCH_BYTES", 1000)
    texts = [f"document {i} " * (i % 17 + 1) for i in range(500)]
    batches = list(reader_of(store(tmp_path / name, rows(*texts))))
    assert texts_of(batches) == texts
    # A batch ends with the row that reaches the size; the longest row is under 260 bytes.
    assert all(1000 <= batch.bytes_read < 1260 for batch in batches[:-1])


def test_a_stretch_of_bad_rows_shows_as_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BATCH_BYTES", 100)
    content = b"{}\n" * 100 + rows("x")
    batches = list(reader_of(store(tmp_path / "a.jsonl", content)))
    assert sum(batch.bytes_read for batch in batches) == len(content)
    assert batches[0].texts == []


@pytest.mark.parametrize("name", STORED_AS)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    """24 MiB of rows pass through a batch (4 MiB of source, 4 of text) and a few blocks."""
    # Digits, so that compression does what it does to text.
    texts = [random.Random(seed).randbytes(5000).hex() for seed in range(250)]
    path = store(tmp_path / name, rows(*texts) * 10)
    reader = reader_of(path)
    tracemalloc.start()
    assert sum(len(batch.texts) for batch in reader) == 2500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20


def test_a_document_of_ten_megabytes_is_one_row(tmp_path: Path) -> None:
    text = "a book of ten million letters. " * 340_000
    path = store(tmp_path / "a.jsonl.zst", rows("before", text, "after"))
    assert texts_of(reader_of(path)) == ["before", text, "after"]


@pytest.mark.parametrize("name", STORED_AS)
def test_a_row_beyond_the_limit_is_skipped_without_holding_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_rules, "MAX_ROW_BYTES", 100_000)
    fits = "f" * (100_000 - len(rows("")) + 1)  # the newline does not count
    path = store(tmp_path / name, rows("a", fits, fits + "f", "l" * (16 << 20), "b"))
    reader = reader_of(path)
    tracemalloc.start()
    assert texts_of(reader) == ["a", fits, "b"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reader.skipped == {"row_too_long": 2}
    assert reader.rows == 5
    # Three blocks of 256 KiB, or what 16 KiB of zstandard expand to: far from the 16 MiB line.
    assert peak < 4 << 20 or name.endswith(".zst")


@given(st.lists(st.text(st.characters(codec=None), max_size=20), min_size=1, max_size=10))
def test_any_text_that_json_can_hold_is_read_back(texts: list[str]) -> None:
    """Lone surrogates included, which `characters(codec=None)` draws."""
    for text in texts:
        line = json.dumps({"text": text}).encode()
        row = row_rules.parse_row(line, "text")
        # The standard library joins a high and a low half that stand side by side.
        joined = json.loads(line)["text"]
        expected = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in joined)
        assert (row.text if isinstance(row, row_rules.Unusual) else row) == expected
        assert isinstance(row, str) == (expected == joined and text != "")


def write_parquet(path: Path, columns: dict[str, object], **options: object) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_parquet_columns(tmp_path: Path) -> None:
    texts = [f"text {i} caf\u00e9 \U0001f600" for i in range(1000)]
    path = write_parquet(tmp_path / "a.parquet", {"id": range(1000), "body": texts})
    reader = reader_of(path, field="body")
    assert reader.file.format is Format.PARQUET
    assert texts_of(reader) == texts
    assert reader.rows == 1000
    [file] = reader.inputs
    assert (file.bytes, file.sha256) == (
        path.stat().st_size,
        hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def test_bad_parquet_rows_are_counted(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    raw = pyarrow.array([b"good", b"caf\xe9", b"", None], pyarrow.binary()).view("string")
    path = write_parquet(tmp_path / "a.parquet", {"text": raw})
    reader = reader_of(path)
    assert texts_of(reader) == ["good"]
    assert reader.skipped == {"invalid_utf8": 1, "empty_text": 1, "text_not_string": 1}
    with pytest.raises(DataError, match=r"2 of 4 rows .*a\.parquet:2 \(invalid_utf8"):
        list(reader_of(path, max_bad_fraction=0.01))


def test_parquet_of_large_rows_is_read_in_pieces(tmp_path: Path) -> None:
    """One row group of 64 MB in pages of 1 MB; what is held is a few pages and one batch."""
    pyarrow = pytest.importorskip("pyarrow")
    texts = [f"{i} " + "x" * 1_000_000 for i in range(64)]
    path = write_parquet(
        tmp_path / "a.parquet", {"text": texts}, use_dictionary=False, write_batch_size=1
    )
    before = pyarrow.total_allocated_bytes()
    batches = 0
    for batch in (reader := reader_of(path)):
        batches += 1
        assert pyarrow.total_allocated_bytes() - before < 16 << 20
        assert len(batch.texts) <= 6  # of 1 MB each, where a batch is to hold 4 MiB
    assert batches > 10
    assert reader.rows == 64


def test_what_is_no_parquet_column_of_text_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"id": [1], "body": ["x"]})
    with pytest.raises(DataError, match=r"no string column 'text'; it has id \(int64\), body"):
        list(reader_of(path))
    with pytest.raises(DataError, match=r"no string column 'id'"):
        list(reader_of(path, field="id"))
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], rows("x")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet is not a whole Parquet file"):
            list(reader_of(path, field="body"))
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.parquet is empty"):
        list(reader_of(path, field="body"))


def test_parquet_without_pyarrow_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        list(reader_of(store(tmp_path / "a.parquet", b"x")))
