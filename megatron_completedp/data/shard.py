"""One input file to one pair of token files and its manifest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from megatron_completedp.data.encoder import EncodeCounts, Encoder, EnginesDisagree
from megatron_completedp.data.indexed_writer import open_indexed
from megatron_completedp.data.manifest import ShardManifest, manifest_path, write_manifest
from megatron_completedp.data.readers import ShardReader
from megatron_completedp.data.sources import SourceFile

logger = logging.getLogger(__name__)

#: Called with (documents, source bytes, tokens) since the last call.
OnProgress = Callable[[int, int, int], None]


def write_shard(
    file: SourceFile,
    prefix: Path,
    encoder: Encoder,
    *,
    max_bad_fraction: float,
    on_progress: OnProgress | None = None,
) -> ShardManifest:
    """Write PREFIX.bin, PREFIX.idx and, when both are complete, PREFIX.json, which is returned.

    The bytes of all three depend on the input, the tokenizer and the settings alone. Where the
    engines disagree about a sampled document, everything is encoded again by the tokenizer's own
    library; `on_progress` then gets what it was told so far with a minus. Memory is a few batches
    of 4 MiB and 4 bytes per document. Raises DataError for input that cannot be used, and OSError
    from the disk; what is at `prefix` is then no finished pair.
    """
    progress = on_progress or _ignore
    manifest_path(prefix).unlink(missing_ok=True)
    try:
        manifest = _write_pair(file, prefix, encoder, max_bad_fraction, progress)
    except EnginesDisagree as error:
        reference = Encoder(encoder.tokenizer, engine="reference")
        logger.warning(
            "%s: %s and %s encode document %d differently; all of it is left to %s",
            file.url,
            encoder.name,
            reference.name,
            error.document,
            reference.name,
        )
        manifest = _write_pair(
            file, prefix, reference, max_bad_fraction, progress, disagreement=error.document
        )
    write_manifest(prefix, manifest)
    return manifest


def _ignore(documents: int, source_bytes: int, tokens: int) -> None:
    pass


def _write_pair(
    file: SourceFile,
    prefix: Path,
    encoder: Encoder,
    max_bad_fraction: float,
    on_progress: OnProgress,
    *,
    disagreement: int | None = None,
) -> ShardManifest:
    reader = ShardReader(file, max_bad_fraction=max_bad_fraction)
    tokenizer = encoder.tokenizer
    counts = EncodeCounts()
    bytes_read = 0
    with open_indexed(prefix, tokenizer.vocab_size) as writer:
        for batch in reader:
            try:
                ids, lengths = encoder.encode(batch.texts, counts)
            except EnginesDisagree:
                on_progress(-counts.documents, -bytes_read, -writer.tokens)
                raise
            writer.add_documents(ids, lengths)
            bytes_read += batch.bytes_read
            on_progress(lengths.size, batch.bytes_read, ids.size)
    return ShardManifest(
        documents=counts.documents,
        tokens=writer.tokens,
        text_bytes=counts.text_bytes,
        skipped=dict(sorted(reader.skipped.items())),
        repaired_documents=reader.repaired_documents,
        control_literal_documents=counts.control_literal_documents,
        max_token_id=writer.max_token_id,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        dtype=writer.dtype.name,
        tokenizer_sha256=tokenizer.sha256,
        engine=encoder.name,
        reference_documents=counts.reference_documents,
        compared_documents=counts.compared_documents,
        disagreement=disagreement,
        format=file.format,
        field=file.field,
        filter=file.filter,
        max_bad_fraction=max_bad_fraction,
        inputs=tuple(reader.inputs),
        files=writer.files,
    )
