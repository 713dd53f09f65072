"""Ways to spoil a checkpoint."""

from __future__ import annotations

from pathlib import Path


def a_shard(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def truncate(checkpoint: Path) -> None:
    path = a_shard(checkpoint)
    path.write_bytes(path.read_bytes()[:-1])


def flip(checkpoint: Path) -> None:
    path = a_shard(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(bytes(content))


def delete(checkpoint: Path) -> None:
    a_shard(checkpoint).unlink()


def forge_table(checkpoint: Path) -> None:
    path = checkpoint / "hyperparams.json"
    path.write_text(path.read_text().replace('"q"', '"k"', 1))
