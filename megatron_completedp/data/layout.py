"""What a file's place and name tell about it: the published layouts of RedPajama, or a suffix."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

from megatron_completedp.data.redpajama_v2 import document_key

#: What a file of rows may end with; the longest first, so that all of it is cut from a key.
JSONL_SUFFIXES = (".jsonl.zst", ".jsonl.gz", ".json.zst", ".json.gz", ".jsonl")
PARQUET_SUFFIX = ".parquet"

#: RedPajama-1T: what the files of each subset's folder were published as, without suffix.
_NAMES_1T = {
    "arxiv": r"arxiv_[^/]+",
    "book": r"book",
    "c4": r"c4-train\.[^/]+",
    "common_crawl": r"[^/]+/[^/]+\.dedup\.classifier",
    "github": r"filtered_[^/]+",
    "stackexchange": r"stackexchange",
    "wikipedia": r"wiki",
}
_LAYOUT_1T = re.compile(
    "(?:.*/)?(?P<key>" + "|".join(f"{name}/{file}" for name, file in _NAMES_1T.items()) + ")"
)
#: RedPajama-1T-Sample: one file per subset, for common_crawl one per dump.
_SAMPLE_1T = re.compile(
    r"(?:.*/)?(?P<name>(?P<part>arxiv|book|c4|cc_\d{4}-\d{2}|github|stackexchange|wikipedia)"
    r"_sample)"
)
#: What lies beside the documents of RedPajama-V2 and is no shard by itself.
_BESIDE_V2 = re.compile(r"(?:.*/)?(?:quality_signals|duplicates|minhash)/\d{4}-\d{2}/\d+/[^/]+")


class Format(StrEnum):
    """How documents are stored."""

    REDPAJAMA_1T = "redpajama-1t"
    REDPAJAMA_V2 = "redpajama-v2"
    JSONL = "jsonl"
    PARQUET = "parquet"


class Told(NamedTuple):
    """What the name of a shard tells."""

    format: Format
    subset: str
    """The subset in a layout of RedPajama; empty otherwise."""
    name: str
    """What to call the shard within its subset; empty where there is no such layout."""


def stem(path: str) -> str:
    """`path` without the suffix of JSONL or Parquet; empty if it has none of them."""
    for suffix in (*JSONL_SUFFIXES, PARQUET_SUFFIX):
        if path.endswith(suffix):
            return path.removesuffix(suffix)
    return ""


def tell(url: str) -> Told | None:
    """What the name of `url` tells; None for no shard: another kind of file, or V2's signals."""
    path = stem(url)
    if not path or _BESIDE_V2.fullmatch(url):
        return None
    if key := document_key(url):
        return Told(Format.REDPAJAMA_V2, "redpajama-v2", key)
    if sample := _SAMPLE_1T.fullmatch(path):
        subset = "common_crawl" if sample["part"].startswith("cc_") else sample["part"]
        return Told(Format.REDPAJAMA_1T, subset, sample["name"])
    if layout := _LAYOUT_1T.fullmatch(path):
        subset, _, name = layout["key"].partition("/")
        return Told(Format.REDPAJAMA_1T, subset, name)
    return Told(Format.PARQUET if path + PARQUET_SUFFIX == url else Format.JSONL, "", "")
