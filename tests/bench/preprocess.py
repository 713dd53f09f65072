"""Speed of preprocessing: Wikipedia JSONL to .bin/.idx and manifest under GPT-NeoX-20B's tokenizer.

    COMPLETEDP_DATA=/path/to/data python tests/bench/preprocess.py [--rounds 5] [--mb 40]

The first 40 MB of corpus/wikipedia as two files, plain and by zstandard, made into shards by the
code that a worker runs: claim, restart check, reading, hashing, encoding, writing, manifest. One
worker takes both files, two take one each. Workers are started, and have encoded a batch, before
the clock runs; that start is shown apart. Rounds of all kinds alternate, each into a fresh folder.

Beside them, in the same rounds and on a tenth of the text, runs what Megatron's preprocess_data.py
does for one worker: json, one document at a time through `tokenizers`, and each into the
IndexedDatasetBuilder of megatron-core. That script is not part of the megatron-core package, so
this stands for it; its pair must be ours, byte for byte. Without megatron-core it is left out.

MiB are of JSONL before compression. On a machine that does other work too, read the figures by CPU
seconds, which suffer less. The last line is one JSON object: MiB/s of the best round for one and
two workers, for zstandard and the peer, all by the clock, then by CPU time (cpu_*), and the largest
memory of a worker.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import zstandard

from megatron_completedp.data.encoder import EncodeCounts, Encoder
from megatron_completedp.data.indexed import bin_path, idx_path
from megatron_completedp.data.restart import ShardOrder, make_shard
from megatron_completedp.data.sources import Source, SourceFile, find_files
from megatron_completedp.data.tokenizer import load_tokenizer

MIB = 1 << 20
PEER_SHARE = 10
"""The peer gets one part of this many."""


class Taken(NamedTuple):
    """What a round took."""

    wall_s: float
    cpu_s: float


class Worker:
    """A process that makes shards on request, and says what they took."""

    def __init__(self, tokenizer: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(tokenizer, theirs), daemon=True)
        self._process.start()
        self.start_cpu_s: float = self.connection.recv()

    def stop(self) -> int:
        """End it; returns the most memory that it had, in bytes."""
        self.connection.send(None)
        peak: int = self.connection.recv()
        self._process.join()
        return peak


def _work(path: Path, connection: Connection) -> None:
    tokenizer = load_tokenizer(path)
    encoder = Encoder(tokenizer)
    encoder.encode(["It imports and fills its caches in the first batch."], EncodeCounts())
    connection.send(time.process_time())
    while (request := connection.recv()) is not None:
        out, files = request
        order = ShardOrder(
            out=out,
            tokenizer=path,
            tokenizer_sha256=tokenizer.sha256,
            engine="auto",
            max_bad_fraction=0.01,
        )
        before = time.process_time()
        for file in files:
            make_shard(order, file, encoder, wait=False)
        connection.send(time.process_time() - before)
    connection.send(_peak_bytes())


def _peak_bytes() -> int:
    """The most memory that this process had; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def run_ours(workers: Sequence[Worker], files: Sequence[SourceFile], out: Path) -> Taken:
    """All shards, by turns to the workers."""
    started = time.perf_counter()
    for i, worker in enumerate(workers):
        worker.connection.send((out, files[i :: len(workers)]))
    cpu_s = sum(worker.connection.recv() for worker in workers)
    return Taken(time.perf_counter() - started, cpu_s)


def load_peer(tokenizer_path: Path) -> Callable[[Path, Path], Taken] | None:
    """A function of (JSONL file, prefix) that does as Megatron's tool; None without its package."""
    try:
        import tokenizers
        import torch
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    except ImportError:
        return None
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_path))
    ours = load_tokenizer(tokenizer_path)

    def run_peer(source: Path, prefix: Path) -> Taken:
        wall, cpu = time.perf_counter(), time.process_time()
        dtype = DType.optimal_dtype(ours.vocab_size)
        builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
        with source.open(encoding="utf-8") as stream:
            for line in stream:
                text = json.loads(line)["text"]
                ids = [*tokenizer.encode(text, add_special_tokens=False).ids, ours.eod]
                builder.add_document(torch.tensor(ids), [len(ids)])
        builder.finalize(str(idx_path(prefix)))
        return Taken(time.perf_counter() - wall, time.process_time() - cpu)

    return run_peer


def write_inputs(wikipedia: Path, folder: Path, size: int) -> int:
    """FOLDER/{plain,zst}/{0,1}.jsonl*, `size` bytes in all, and peer/; returns their bytes."""
    with zstandard.open(wikipedia, "rb") as stream:
        text = stream.read(size)
    text = text[: text.rindex(b"\n") + 1]
    middle = text.index(b"\n", len(text) // 2) + 1
    for name in ("plain", "zst", "peer"):
        (folder / name).mkdir()
    for i, part in enumerate((text[:middle], text[middle:])):
        (folder / "plain" / f"{i}.jsonl").write_bytes(part)
        # Level 9 is near the ratio at which RedPajama's common_crawl was published.
        packed = zstandard.ZstdCompressor(level=9).compress(part)
        (folder / "zst" / f"{i}.jsonl.zst").write_bytes(packed)
    end = text.index(b"\n", len(text) // PEER_SHARE) + 1
    (folder / "peer" / "part.jsonl").write_bytes(text[:end])
    return len(text)


def measure(data: Path, rounds: int, size: int) -> dict[str, Any]:
    """Run everything `rounds` times; prints the table and returns the figures."""
    tokenizer = data / "tokenizers" / "gpt-neox-20b.tokenizer.json"
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        size = write_inputs(data / "corpus" / "wikipedia" / "wiki.jsonl.zst", folder, size)
        files = {
            name: find_files([Source(path=str(folder / name))]) for name in ("plain", "zst", "peer")
        }
        part = folder / "peer" / "part.jsonl"
        run_peer = load_peer(tokenizer)
        workers = [Worker(tokenizer) for _ in range(2)]
        taken: dict[str, list[Taken]] = {}
        for number in range(rounds):
            out = folder / f"out{number}"

            def ours(name: str, count: int, out: Path = out) -> Taken:
                return run_ours(workers[:count], files[name], out / f"{name}{count}")

            results = {
                "1 worker": ours("plain", 1),
                "2 workers": ours("plain", 2),
                "1 worker, zst": ours("zst", 1),
            }
            if run_peer:
                results["peer, 1 worker"] = run_peer(part, out / "peer")
            for name, result in results.items():
                taken.setdefault(name, []).append(result)
        if run_peer:
            run_ours(workers[:1], files["peer"], folder / "same")
            for path in (bin_path, idx_path):
                ours_bytes = path(folder / "same" / files["peer"][0].key).read_bytes()
                assert ours_bytes == path(out / "peer").read_bytes(), "the peer writes other bytes"
        sizes = dict.fromkeys(taken, size) | {"peer, 1 worker": part.stat().st_size}
        start_cpu_s = min(worker.start_cpu_s for worker in workers)
        peak = max(worker.stop() for worker in workers)
    print(f"{size / 1e6:.1f} MB of JSONL, best of {rounds} rounds; load {os.getloadavg()[0]:.1f}")
    print(f"start of a worker {start_cpu_s:.1f} CPU s; its memory at most {peak / MIB:.0f} MiB")
    print(f"{'':16}{'MiB/s':>8}{'MiB per CPU s':>15}")
    figures: dict[str, Any] = {}
    for (name, results), key in zip(taken.items(), ("1", "2", "zst_1", "peer_1"), strict=False):
        wall = sizes[name] / MIB / min(result.wall_s for result in results)
        cpu = sizes[name] / MIB / min(result.cpu_s for result in results)
        print(f"{name:16}{wall:8.1f}{cpu:15.1f}")
        key = f"{key[:-2]}_mib_s_1" if "_" in key else f"mib_s_{key}"
        figures |= {key: round(wall, 1), f"cpu_{key}": round(cpu, 1)}
    return figures | {"peak_mib": round(peak / MIB)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mb", type=float, default=40.0, help="million bytes of JSONL")
    args = parser.parse_args()
    if "COMPLETEDP_DATA" not in os.environ:
        sys.exit("skipped: COMPLETEDP_DATA names no folder with corpus/wikipedia and tokenizers/")
    figures = measure(Path(os.environ["COMPLETEDP_DATA"]), args.rounds, int(args.mb * 1e6))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
