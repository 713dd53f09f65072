"""The preprocessing job: text files to token files, fast, restartable, the same bytes every time.

    find the files -> make the folder ours -> make every shard -> merge -> blend.yaml -> summary

One file of text becomes one shard: OUT/<subset>/<file>.bin, .idx and a manifest. Shards are
independent, so any number of processes and machines share them out (`workers`), and a job that was
stopped goes on where it was (`restart`). The bytes depend on the text, the tokenizer and the
settings alone.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_completedp.config.cli import read_arguments
from megatron_completedp.core.render import text_table
from megatron_completedp.data.encoder import Encoder
from megatron_completedp.data.folder import claim_folder
from megatron_completedp.data.manifest import ShardManifest
from megatron_completedp.data.merge import merge_pairs
from megatron_completedp.data.mixture import Pair, blend_weights, subset_weights, write_blend
from megatron_completedp.data.report import ProgressBar, expected_bytes, summary_table
from megatron_completedp.data.restart import Finished, ShardOrder, stored_bytes
from megatron_completedp.data.settings import PreprocessConfig, build_preprocess
from megatron_completedp.data.show import show_documents
from megatron_completedp.data.sources import SourceFile, find_files
from megatron_completedp.data.workers import Progress, run_workers
from megatron_completedp.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

PROG = "python tools/preprocess_redpajama.py"
DESCRIPTION = """\
Turn RedPajama, or any JSONL or Parquet text, into the .bin/.idx files that training reads.

One pair per text file, with a manifest of counts and hashes, in OUT/<subset>/; OUT/blend.yaml is
the `data:` section of a run on all of them. Started again, or by several machines at once, it makes
what is missing. Exit codes: 0 every shard is finished, 1 some are not (their reasons are printed;
the others stay), 2 settings that contradict each other or the folder, 130 Ctrl-C.

Examples:
  python tools/preprocess_redpajama.py --config examples/preprocess/redpajama.yaml
  python tools/preprocess_redpajama.py --sources data/redpajama-1t --out data/neox \\
      --tokenizer data/gpt-neox-20b.tokenizer.json --mixture redpajama --workers 16
  python tools/preprocess_redpajama.py --sources notes.jsonl --out data/own \\
      --train-tokenizer.vocab-size 8000
  python tools/preprocess_redpajama.py --inspect data/neox/wikipedia/wiki
"""

BLEND_NAME = "blend.yaml"
MERGED_NAME = "merged"
#: Failed shards named in the final error; their count is told.
MAX_REASONS = 10


@dataclass(frozen=True, kw_only=True)
class CommandFlags:
    """Flags of this command alone."""

    dry_run: bool = False
    """List the shards and their sizes, and stop."""
    inspect: str | None = None
    """Print the first documents of the pair with this prefix as text, and stop."""
    documents: int = 3
    """How many --inspect prints."""


def main(argv: Sequence[str]) -> int:
    """Run the job that `argv` describes. Returns the exit code."""
    tree, flags = read_arguments(
        argv, PreprocessConfig, prog=PROG, description=DESCRIPTION, extra=CommandFlags
    )
    if flags.inspect is not None:
        for document in show_documents(Path(flags.inspect), flags.documents):
            print(document)
        return 0
    config = build_preprocess(tree)
    if flags.dry_run:
        print(plan_text(config))
        return 0
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    try:
        with logging_redirect_tqdm():
            print(preprocess(config))
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what is missing", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def plan_text(config: PreprocessConfig) -> str:
    """A table of the shards that `config` would make, largest first, without reading any text."""
    sizes = _sizes(find_files(config.sources))
    subset_weights(config, {file.subset for file, _ in sizes})
    rows = [(file.key, file.subset, str(file.format), f"{size / 1e6:,.2f}") for file, size in sizes]
    return (
        f"{text_table(('shard', 'subset', 'format', 'stored MB'), rows, left=None)}\n"
        f"{len(sizes):,} shards of {sum(size for _, size in sizes) / 1e6:,.2f} MB stored, to "
        f"{config.out}, with {config.processes} workers"
    )


def preprocess(config: PreprocessConfig) -> str:
    """Make every shard of `config` that is not finished; returns the summary table.

    Then merges, if asked to, and writes OUT/blend.yaml. Raises ConfigError before any work for
    settings that contradict each other or the folder, and DataError at the end where shards are
    missing: everything finished stays, and the same call goes on from there.
    """
    sizes = _sizes(find_files(config.sources))
    subsets = {file.subset for file, _ in sizes}
    if config.merge != "none" and MERGED_NAME in subsets:
        raise ConfigError(
            f"merged pairs go to {config.out}/{MERGED_NAME}/, which is also the folder of the "
            f"subset {MERGED_NAME}; give that source another `subset`, or do not merge."
        )
    weights = subset_weights(config, subsets)
    tokenizer = claim_folder(config, [file for file, _ in sizes])
    # Made here too, so that a missing package is one error rather than one per shard.
    engine = Encoder(tokenizer, engine=config.engine).name
    logger.info("shards: %d, workers: %d, engine: %s", len(sizes), config.processes, engine)
    order = ShardOrder(
        out=Path(config.out),
        tokenizer=tokenizer.path,
        tokenizer_sha256=tokenizer.sha256,
        engine=config.engine,
        max_bad_fraction=config.max_bad_fraction,
    )
    finished, failures = _make_shards(order, sizes, config.processes)
    # In the order of names, so that the files written below do not depend on who was faster.
    files = sorted((file for file, _ in sizes), key=lambda file: file.key)
    table = summary_table(
        (file.subset, finished[file.key]) for file in files if file.key in finished
    )
    if failures:
        logger.info("finished so far:\n%s", table)
        raise DataError(_describe(failures, len(files)))
    pairs = [Pair(order.prefix(file), file.subset, finished[file.key].tokens) for file in files]
    pairs = _merged(config, pairs)
    write_blend(order.out / BLEND_NAME, pairs, blend_weights(pairs, weights), tokenizer.path)
    return table


def _sizes(files: Sequence[SourceFile]) -> list[tuple[SourceFile, int]]:
    """Each file with its stored bytes, largest first: begun last, it would keep all waiting."""
    sizes = [(file, stored_bytes(file)) for file in files]
    return sorted(sizes, key=lambda item: (-item[1], item[0].key))


def _make_shards(
    order: ShardOrder, sizes: Sequence[tuple[SourceFile, int]], processes: int
) -> tuple[dict[str, ShardManifest], dict[str, str]]:
    """The manifest of each finished shard by its key, and the reason for each that is not."""
    finished: dict[str, ShardManifest] = {}
    bar = ProgressBar({file.key: expected_bytes(file.url, size) for file, size in sizes})

    def on_progress(file: SourceFile, done: Progress) -> None:
        bar.advance(file.key, *done)

    def on_finished(file: SourceFile, shard: Finished) -> None:
        finished[file.key] = shard.manifest
        bar.finish(file.key)
        logger.info(
            "%s: %s, %s documents, %s tokens",
            file.key,
            "made" if shard.made else "found finished",
            f"{shard.manifest.documents:,}",
            f"{shard.manifest.tokens:,}",
        )

    try:
        failures = run_workers(
            order,
            [file for file, _ in sizes],
            processes,
            on_progress=on_progress,
            on_finished=on_finished,
        )
    finally:
        logger.info("%s", bar.close())
    return finished, failures


def _merged(config: PreprocessConfig, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that training is to read: `pairs`, or one per subset, or one."""
    if config.merge == "none":
        return list(pairs)
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.subset if config.merge == "subset" else "all", []).append(pair)
    merged = []
    for name, group in groups.items():
        target = Path(config.out) / MERGED_NAME / name
        manifest = merge_pairs([pair.prefix for pair in group], target)
        merged.append(Pair(target, name, manifest.tokens))
    return merged


def _describe(failures: Mapping[str, str], shards: int) -> str:
    reasons = [f"  {key}: {reason}" for key, reason in failures.items()]
    more = f"\n  and {len(reasons) - MAX_REASONS} more" if len(reasons) > MAX_REASONS else ""
    return (
        f"{len(failures)} of {shards} shards are not finished:\n"
        + "\n".join(reasons[:MAX_REASONS])
        + f"{more}\nThe others stay; mend the causes and run the same command again."
    )
