"""The first documents of a pair, as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_completedp.data.folder import find_tokenizer
from megatron_completedp.data.indexed import open_pair
from megatron_completedp.data.manifest import verify_shard

#: Of one document; a book would scroll everything else away.
MAX_CHARS = 2000


def show_documents(prefix: Path, count: int) -> Iterator[str]:
    """The first `count` documents of the pair at `prefix`, each after a line that numbers it.

    Text beyond MAX_CHARS is left out, and said so. Raises DataError when the pair does not match
    its manifest and when its tokenizer is in no folder above it.
    """
    manifest = verify_shard(prefix)
    tokenizer = find_tokenizer(prefix, manifest.tokenizer_sha256)
    ids, lengths = open_pair(prefix)
    ends = np.cumsum(lengths[:count], dtype=np.int64)
    for number, (end, length) in enumerate(zip(ends, lengths[:count], strict=True)):
        document = ids[end - length : end]
        text = tokenizer.decode(document[:-1].tolist())
        more = f"\n[... {len(text) - MAX_CHARS:,} characters more]" if len(text) > MAX_CHARS else ""
        yield (
            f"--- document {number} of {manifest.documents:,}: {length:,} tokens, "
            f"{'then' if document[-1] == tokenizer.eod else 'NO'} end of document\n"
            f"{text[:MAX_CHARS]}{more}"
        )
