"""Sources to shards: RedPajama's layouts as published, any JSONL or Parquet, local or by URL."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import known_implementations
from reader_samples import rows, store

from megatron_completedp.config.load import build
from megatron_completedp.data.layout import Format
from megatron_completedp.data.readers import ShardReader
from megatron_completedp.data.redpajama_v2 import V2Filter
from megatron_completedp.data.sources import Source, find_files
from megatron_completedp.errors import ConfigError, DataError

UUID = "4ac4815d-5a00-dc2e-acab-7824cf4e4baa"
DUMP = "common_crawl/2023-06/en_head_0000.json.gz.dedup.classifier"

#: Published name of RedPajama-1T to (subset, key).
PUBLISHED = {
    f"arxiv/arxiv_{UUID}.jsonl": ("arxiv", f"arxiv/arxiv_{UUID}"),
    "book/book.jsonl": ("book", "book/book"),
    "c4/c4-train.00000-of-01024.jsonl": ("c4", "c4/c4-train.00000-of-01024"),
    f"{DUMP}.jsonl.zst": ("common_crawl", DUMP),
    "github/filtered_ab12.sampled.jsonl": ("github", "github/filtered_ab12.sampled"),
    "stackexchange/stackexchange.jsonl": ("stackexchange", "stackexchange/stackexchange"),
    "wikipedia/wiki.jsonl": ("wikipedia", "wikipedia/wiki"),
}
SAMPLE = {
    "arxiv_sample.jsonl": ("arxiv", "arxiv/arxiv_sample"),
    "book_sample.jsonl.zst": ("book", "book/book_sample"),
    "c4_sample.jsonl": ("c4", "c4/c4_sample"),
    "cc_2019-30_sample.jsonl": ("common_crawl", "common_crawl/cc_2019-30_sample"),
    "cc_2023-06_sample.jsonl": ("common_crawl", "common_crawl/cc_2023-06_sample"),
    "github_sample.jsonl.gz": ("github", "github/github_sample"),
    "stackexchange_sample.jsonl": ("stackexchange", "stackexchange/stackexchange_sample"),
    "wikipedia_sample.jsonl": ("wikipedia", "wikipedia/wikipedia_sample"),
}
V2 = [
    "documents/2023-06/0000/en_head.json.gz",
    "documents/2023-06/0000/de_middle.json.gz",
    "documents/2023-06/0000/en_tail.json.gz",
    "quality_signals/2023-06/0000/en_head.signals.json.gz",
    "duplicates/2023-06/0000/en_head.duplicates.parquet",
    "minhash/2023-06/0000/en_head.minhash.parquet",
]


def tree(root: Path, *names: str) -> Path:
    """Files of these names under `root`, each with one row."""
    for name in names:
        store(root / name, rows("x"))
    return root


def keys(*sources: Source) -> list[str]:
    return [file.key for file in find_files(sources)]


@pytest.mark.parametrize("published", [PUBLISHED, SAMPLE], ids=["1T", "1T-Sample"])
def test_redpajama_1t_is_told_by_its_names(
    tmp_path: Path, published: dict[str, tuple[str, str]]
) -> None:
    # What lies beside the files, as after a download, is not taken for text.
    root = tree(tmp_path, *published, "urls.txt", "README.md", ".cache/c4.jsonl", "c4/.part.jsonl")
    files = find_files([Source(path=str(root))])
    assert {file.url: (file.subset, file.key) for file in files} == {
        f"{root}/{name}": expected for name, expected in published.items()
    }
    assert {file.format for file in files} == {Format.REDPAJAMA_1T}
    assert {(file.field, file.filter) for file in files} == {("text", None)}
    assert [file.key for file in files] == sorted(file.key for file in files)
    # A file named by itself has the same key: it does not depend on how it was found.
    for name, (_, key) in published.items():
        assert keys(Source(path=str(root / name))) == [key]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz"])
def test_compression_does_not_change_the_key(tmp_path: Path, suffix: str) -> None:
    root = tree(tmp_path, f"wikipedia/wiki{suffix}")
    assert keys(Source(path=str(root))) == ["wikipedia/wiki"]


def test_redpajama_v2_is_told_by_its_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tree(tmp_path, *V2)
    files = find_files([Source(path=str(root))])
    assert [file.key for file in files] == [
        "redpajama-v2/2023-06/0000/de_middle",
        "redpajama-v2/2023-06/0000/en_head",
    ]
    assert {(file.format, file.subset, file.field) for file in files} == {
        (Format.REDPAJAMA_V2, "redpajama-v2", "raw_content")
    }
    assert files[0].filter == V2Filter()
    assert "1 tail shards are left out" in caplog.text

    unrated = Source(path=str(root), filter=V2Filter(allow_unrated=True))
    assert keys(unrated)[-1] == "redpajama-v2/2023-06/0000/en_tail"

    with pytest.raises(DataError, match=r"no input shard among 1 files \(1 left out as tail\)"):
        find_files([Source(path=str(root / "documents/2023-06/0000/en_tail.json.gz"))])


def test_other_files_are_named_after_what_was_given(tmp_path: Path) -> None:
    root = tree(tmp_path / "notes", "a.jsonl", "deep/b.parquet", "deep/c.json.gz")
    # A folder of parts is one subset, so that a mixture can weigh it.
    files = find_files([Source(path=str(root))])
    assert [(file.subset, file.key, file.format) for file in files] == [
        ("notes", "notes/a", Format.JSONL),
        ("notes", "notes/deep/b", Format.PARQUET),
        ("notes", "notes/deep/c", Format.JSONL),
    ]
    assert keys(Source(path=f"{root}/")) == keys(Source(path=str(root)))
    assert keys(Source(path=str(root / "a.jsonl"))) == ["a/a"]
    assert keys(Source(path=f"{root}/*.jsonl")) == ["notes/a"]
    assert keys(Source(path=f"{tmp_path}/*/deep/*")) == [
        f"{tmp_path.name}/notes/deep/b",
        f"{tmp_path.name}/notes/deep/c",
    ]
    assert keys(Source(path=str(root), subset="mine", format=Format.PARQUET)) == ["mine/deep/b"]
    [file] = find_files([Source(path=str(root / "a.jsonl"), field="body")])
    assert file.field == "body"


def test_a_format_that_is_given_overrules_the_names(tmp_path: Path) -> None:
    root = tree(tmp_path / "d", "wikipedia/wiki.jsonl", "x.jsonl")
    assert keys(Source(path=str(root), format=Format.JSONL)) == ["d/wikipedia/wiki", "d/x"]
    with pytest.raises(DataError, match=r"x\.jsonl is not in the layout of redpajama-1t"):
        find_files([Source(path=str(root), format=Format.REDPAJAMA_1T)])
    # A subset of one's own leaves the rest of the published name.
    assert keys(Source(path=f"{root}/wikipedia", subset="wiki-en")) == ["wiki-en/wiki"]


def test_relative_paths_links_and_magic_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "disk", "c4/c4-train.0-of-1.jsonl")
    tree(tmp_path / "data[1]", "wikipedia/wiki.jsonl")
    (tmp_path / "data[1]" / "c4").symlink_to(tmp_path / "disk" / "c4")
    monkeypatch.chdir(tmp_path)
    files = find_files([Source(path="data[1]")])
    assert [file.key for file in files] == ["c4/c4-train.0-of-1", "wikipedia/wiki"]
    assert files[1].url == f"{tmp_path}/data[1]/wikipedia/wiki.jsonl"


def test_sources_keep_their_order(tmp_path: Path) -> None:
    root = tree(tmp_path, "z.jsonl", "a.jsonl", "m/2.jsonl", "m/1.jsonl")
    sources = [Source(path=str(root / name)) for name in ("z.jsonl", "m", "a.jsonl")]
    assert keys(*sources) == ["z/z", "m/1", "m/2", "a/a"]


def test_two_files_with_one_key_are_refused(tmp_path: Path) -> None:
    root = tree(tmp_path, "c4_sample.jsonl", "c4_sample.jsonl.zst")
    with pytest.raises(DataError, match=r"both be written to c4/c4_sample\. .*`subset`"):
        find_files([Source(path=str(root))])
    one = Source(path=str(root / "c4_sample.jsonl"))
    with pytest.raises(DataError, match="both be written"):
        find_files([one, one])
    other = Source(path=str(root / "c4_sample.jsonl.zst"), subset="other")
    assert keys(one, other) == ["c4/c4_sample", "other/c4_sample"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{root}/missing", "does not exist or cannot be reached"),
        ("{root}/missing/*.jsonl", "no input shard among 0 files"),
        ("{root}/README.md", r"no input shard among 1 files .*expected names ending in .jsonl"),
        ("{root}/empty", "no input shard among 0 files"),
        ("nosuch://a/b.jsonl", "Protocol not known: nosuch"),
        ("{root}/my notes", r"subset 'my notes', which is no name .*Set `subset`"),
    ],
)
def test_what_cannot_be_a_source_is_named(tmp_path: Path, path: str, message: str) -> None:
    root = tree(tmp_path, "README.md", "my notes/a.jsonl")
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        find_files([Source(path=path.format(root=root))])


def test_malformed_sources_are_refused() -> None:
    with pytest.raises(DataError, match="no source is given"):
        find_files([])
    with pytest.raises(ConfigError, match="empty path"):
        Source(path="")
    for subset in ("../up", "a/b", "", "..", "a b"):
        with pytest.raises(ConfigError, match=r"names a folder of the output; expected letters"):
            Source(path="x", subset=subset)


def test_a_source_loads_from_yaml_values_and_reaches_other_processes(tmp_path: Path) -> None:
    root = tree(tmp_path, V2[0])
    values = {
        "path": str(root),
        "format": "redpajama-v2",
        "filter": {"minimum": {"rps_doc_word_count": 9}, "maximum": {}, "drop_duplicates": False},
    }
    source = build(Source, values)
    assert source.format is Format.REDPAJAMA_V2
    assert source.filter == V2Filter(
        minimum={"rps_doc_word_count": 9.0}, maximum={}, drop_duplicates=False
    )
    files = find_files([source])
    assert pickle.loads(pickle.dumps(files)) == files


def test_urls_of_other_file_systems(tmp_path: Path) -> None:
    root = tree(tmp_path, *PUBLISHED)
    local = find_files([Source(path=str(root))])
    assert find_files([Source(path=root.as_uri())]) == local

    memory = fsspec.filesystem("memory")
    for file in local:
        memory.pipe(file.url.replace(str(root), "/sources/corpus"), Path(file.url).read_bytes())
    remote = find_files([Source(path="memory://sources/corpus")])
    assert [file.key for file in remote] == [file.key for file in local]
    assert remote[0].url.startswith("memory://")
    assert [batch.texts for file in remote for batch in ShardReader(file)] == [["x"]] * 7
    assert keys(Source(path="memory://sources/corpus/wiki*/*.jsonl")) == ["wikipedia/wiki"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An HTTP server over `tmp_path`; yields its URL without a slash at the end."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


def test_http(tmp_path: Path, server: str) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")
    tree(tmp_path, *PUBLISHED)
    [file] = find_files([Source(path=f"{server}/v1.0.0/../wikipedia/wiki.jsonl")])
    assert (file.subset, file.key) == ("wikipedia", "wikipedia/wiki")
    assert [batch.texts for batch in ShardReader(file)] == [["x"]]
    # Links of an index page, as servers of files give it.
    assert keys(Source(path=f"{server}/")) == sorted(key for _, key in PUBLISHED.values())
    with pytest.raises(DataError, match="does not exist or cannot be reached"):
        find_files([Source(path=f"{server}/missing.jsonl")])
    with pytest.raises(DataError, match=r"cannot be listed \(ClientConnectorError"):
        find_files([Source(path="http://127.0.0.1:1/wiki.jsonl")])


def test_a_protocol_without_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"class": "no_such_package.FileSystem", "err": "Install no_such_package"}
    monkeypatch.setitem(known_implementations, "absent", absent)
    with pytest.raises(DataError, match=r"Install no_such_package.*pip install"):
        find_files([Source(path="absent://bucket/a.jsonl")])
