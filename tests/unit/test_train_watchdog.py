"""A process that stands still ends with stacks; one that goes on does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 0.5

SCRIPT = f"""
import sys, threading, time
from pathlib import Path
from megatron_completedp.train import watchdog

def wait_for_nothing():
    threading.Event().wait()

watchdog.GRACE_S = 0.1
with watchdog.Watchdog({TIMEOUT_S}, folder=Path(sys.argv[1]), rank=3) as dog:
    for step in range(6):  # three times the timeout in all
        time.sleep({TIMEOUT_S} / 2)
        dog.beat(f"step {{step}}")
    if sys.argv[2] == "hang":
        wait_for_nothing()
time.sleep(2 * {TIMEOUT_S})  # outside, nothing is watched
"""


def run(folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(folder), what]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def test_a_hang_ends_with_the_stacks_of_all_threads(tmp_path: Path) -> None:
    done = run(tmp_path, "hang")
    assert done.returncode == 1
    stacks = (tmp_path / "stacks_rank3.txt").read_text()
    for text in (done.stderr, stacks):
        assert text.startswith("error: rank 3 has finished nothing since step 5, for 0.5 s")
        assert "raise the timeout" in text
        assert "in wait_for_nothing" in text
        assert "in _watch" in text, "every thread, the watching one too"


def test_a_process_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    done = run(tmp_path, "end")
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    done = run(tmp_path / "missing", "hang")
    assert done.returncode == 1
    assert "in wait_for_nothing" in done.stderr
