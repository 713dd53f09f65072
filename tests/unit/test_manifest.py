"""A checkpoint verifies when, and only when, it is what was written; and what a folder keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_completedp.errors import CheckpointError
from megatron_completedp.mcore import store
from megatron_completedp.mcore.manifest import (
    MANIFEST_FILE,
    FileRecord,
    seal,
    verify,
    write_manifest,
)

SHARD = "__0_0.distcp"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = store.checkpoint_path(tmp_path, 8)
    folder.mkdir()
    (folder / SHARD).write_bytes(bytes(range(256)) * 40)
    (folder / "run.json").write_text("{}", encoding="utf-8")
    (folder / ".metadata").write_bytes(b"")
    write_manifest(folder, {path.name: seal(path) for path in folder.iterdir()})
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_an_untouched_checkpoint_verifies(checkpoint: Path) -> None:
    verify(checkpoint)
    assert seal(checkpoint / ".metadata") == FileRecord(
        size=0, sha256="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    ), "SHA-256 of nothing, from the standard"


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (
            lambda c: (c / SHARD).write_bytes((c / SHARD).read_bytes()[:-1]),
            [SHARD, "has 10239 bytes", "expected 10240"],
        ),
        (lambda c: flip(c / SHARD), [SHARD, "has SHA-256", "expected"]),
        (lambda c: (c / SHARD).unlink(), [SHARD, "is missing", "the manifest lists it"]),
        (lambda c: (c / "more").write_bytes(b""), ["more", "is not in the manifest"]),
        (lambda c: (c / MANIFEST_FILE).unlink(), [MANIFEST_FILE, "cannot be read"]),
        (lambda c: (c / MANIFEST_FILE).write_text("[]"), [MANIFEST_FILE, "garbled"]),
        (lambda c: (c / MANIFEST_FILE).write_bytes(b"\xff{"), [MANIFEST_FILE, "garbled"]),
    ],
    ids=["truncated", "flipped", "deleted", "extra", "no_manifest", "list", "binary"],
)
def test_damage_is_named(
    checkpoint: Path, spoil: Callable[[Path], object], parts: list[str]
) -> None:
    spoil(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        verify(checkpoint)
    for part in parts:
        assert part in str(caught.value)


def test_a_manifest_that_was_edited_to_fit_is_caught(checkpoint: Path) -> None:
    flip(checkpoint / SHARD)
    path = checkpoint / MANIFEST_FILE
    content = json.loads(path.read_text())
    content["files"][SHARD]["sha256"] = seal(checkpoint / SHARD).sha256
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"manifest.json has SHA-256 \w+; expected"):
        verify(checkpoint)


def test_shares_together_read_every_file_once(checkpoint: Path) -> None:
    flip(checkpoint / SHARD)
    caught = 0
    for part in range(4):
        try:
            verify(checkpoint, part=part, parts=4)
        except CheckpointError:
            caught += 1
    assert caught == 1


def make(folder: Path, *steps: int) -> list[Path]:
    paths = [store.checkpoint_path(folder, step) for step in steps]
    for path in paths:
        path.mkdir(parents=True)
        (path / "run.json").write_text(str(store.step_of(path)), encoding="utf-8")
    return paths


def test_only_final_names_are_checkpoints(tmp_path: Path) -> None:
    assert store.list_checkpoints(tmp_path / "absent") == []
    late, early = make(tmp_path, 123_456_789, 4)
    (tmp_path / "step_4").mkdir()
    (tmp_path / "latest").write_text("step_00000004\n")
    temporary = store.start_writing(tmp_path)
    assert store.list_checkpoints(tmp_path) == [early, late], "by number, not as text"
    store.publish(temporary, store.checkpoint_path(tmp_path, 5))
    assert [store.step_of(path) for path in store.list_checkpoints(tmp_path)] == [4, 5, 123_456_789]


def test_leftovers_go_at_the_next_save_and_checkpoints_stay(tmp_path: Path) -> None:
    make(tmp_path, 4)
    first = store.start_writing(tmp_path)
    (first / SHARD).write_bytes(b"torn")
    second = store.start_writing(tmp_path)
    assert first != second, "a writer of the first must not write into the second"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [second.name, "step_00000004"]
    )


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (target,) = make(tmp_path, 4)
    temporary = store.start_writing(tmp_path)
    (temporary / "run.json").write_text("new")
    store.publish(temporary, target)
    assert (target / "run.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_tidy_points_and_prunes(tmp_path: Path) -> None:
    paths = make(tmp_path, 2, 4, 6, 8, 10)
    store.tidy(paths[3], keep_last=2, keep_every=4)
    kept = [store.step_of(path) for path in store.list_checkpoints(tmp_path)]
    # 6 and 8 are the last two, 4 is a multiple of 4, 10 lies beyond.
    assert kept == [4, 6, 8, 10]
    assert (tmp_path / "latest").read_text() == "step_00000008\n"
    assert store.pointer_problem(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty; the folder's listing is used"),
        (b"step_00000012\n", "names 'step_00000012', which is not there"),
        (b"../../etc", "names '../../etc', which is not there"),
        (b"\xff\xfe", "cannot be read"),
        (b"step_00000004\n", None),
        (None, None),
    ],
    ids=["empty", "nowhere", "outside", "binary", "right", "absent"],
)
def test_the_pointer_is_only_a_hint(
    tmp_path: Path, content: bytes | None, problem: str | None
) -> None:
    make(tmp_path, 4)
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    found = store.pointer_problem(tmp_path)
    assert (found is None) == (problem is None)
    assert (problem or "") in (found or "")
    assert len(store.list_checkpoints(tmp_path)) == 1


@given(
    steps=st.sets(st.integers(1, 60), min_size=1),
    keep_last=st.integers(1, 5),
    keep_every=st.integers(0, 10),
    data=st.data(),
)
def test_retention(steps: set[int], keep_last: int, keep_every: int, data: st.DataObject) -> None:
    newest = data.draw(st.sampled_from(sorted(steps)))
    gone = store.obsolete(list(steps), newest=newest, keep_last=keep_last, keep_every=keep_every)
    kept = sorted(steps - set(gone))
    reached = sorted(step for step in steps if step <= newest)
    assert set(reached[-keep_last:]) <= set(kept), "the newest always stay"
    assert {step for step in steps if step > newest} <= set(kept)
    if keep_every:
        assert all(step % keep_every for step in gone)
    else:
        assert [step for step in kept if step <= newest] == reached[-keep_last:]
