"""Several pairs as one: documents back to back, in the order of the pairs.

Training does not need it, since a run takes any number of prefixes; a merged pair is for tools that
take one.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_completedp.data.claims import claim
from megatron_completedp.data.indexed import open_pair
from megatron_completedp.data.indexed_writer import open_indexed
from megatron_completedp.data.manifest import (
    ShardManifest,
    manifest_path,
    verify_shard,
    write_manifest,
)
from megatron_completedp.errors import DataError

#: Tokens copied at once, about: few calls, and memory that does not grow with the pairs.
CHUNK_TOKENS = 1 << 22


def merge_pairs(prefixes: Sequence[Path], target: Path) -> ShardManifest:
    """Write the documents of the pairs at `prefixes`, in order, as one pair at `target`.

    Returns its manifest, which sums theirs. A target that was merged from these pairs before stays,
    and processes that merge to one target at once do it once. Raises DataError when a pair does not
    match its manifest or was made with another tokenizer than the first.
    """
    with claim(target.with_name(target.name + ".lock"), wait=True):
        manifests = [verify_shard(prefix) for prefix in prefixes]
        _check_tokenizers(prefixes, manifests)
        summed = _sum(manifests)
        if manifest_path(target).is_file():
            try:
                found = verify_shard(target)
            except DataError:
                pass  # cut short or changed since: made again
            else:
                if dataclasses.replace(found, files=summed.files) == summed:
                    return found
            manifest_path(target).unlink()
        with open_indexed(target, summed.vocab_size) as writer:
            for prefix in prefixes:
                for ids, lengths in _chunks(*open_pair(prefix)):
                    writer.add_documents(ids, lengths)
        merged = dataclasses.replace(summed, files=writer.files)
        write_manifest(target, merged)
    return merged


def _check_tokenizers(prefixes: Sequence[Path], manifests: Sequence[ShardManifest]) -> None:
    first = manifests[0].tokenizer_sha256
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest.tokenizer_sha256 != first:
            raise DataError(
                f"{manifest_path(prefix)}: made with a tokenizer of sha256 "
                f"{manifest.tokenizer_sha256}; {manifest_path(prefixes[0])} has {first}. The same "
                "ids mean other text under them; merge pairs of one tokenizer."
            )


def _sum(manifests: Sequence[ShardManifest]) -> ShardManifest:
    """The manifest of the merged pair, but for its files.

    Format, field and filter are the first pair's; where they differ, the pairs' own manifests tell.
    """

    def total(name: str) -> int:
        return sum(getattr(manifest, name) for manifest in manifests)

    skipped = sum((Counter(manifest.skipped) for manifest in manifests), Counter[str]())
    return dataclasses.replace(
        manifests[0],
        documents=total("documents"),
        tokens=total("tokens"),
        text_bytes=total("text_bytes"),
        skipped=dict(sorted(skipped.items())),
        repaired_documents=total("repaired_documents"),
        control_literal_documents=total("control_literal_documents"),
        max_token_id=max(manifest.max_token_id for manifest in manifests),
        engine=", ".join(sorted({manifest.engine for manifest in manifests})),
        reference_documents=total("reference_documents"),
        compared_documents=total("compared_documents"),
        disagreement=None,
        inputs=tuple(item for manifest in manifests for item in manifest.inputs),
    )


def _chunks(ids: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Whole documents, CHUNK_TOKENS or a little more at a time: (ids [tokens], lengths)."""
    ends = np.cumsum(lengths, dtype=np.int64)
    first = start = 0
    while first < lengths.size:
        last = int(np.searchsorted(ends, start + CHUNK_TOKENS)) + 1
        end = int(ends[:last][-1])
        yield ids[start:end], lengths[first:last]
        first, start = last, end
