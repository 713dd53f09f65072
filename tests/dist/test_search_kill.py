"""A search killed at random loses nothing and proposes what it would have proposed undisturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna")

from optuna.trial import FrozenTrial, TrialState

from megatron_completedp.config.load import build
from megatron_completedp.search.settings import SearchSettings
from megatron_completedp.search.access import Search, read
from tests import postgres
from tests.dist.search_lives import RUN, STEP_S, STEPS

ROOT = Path(__file__).parents[2]

#: What is killed, and how: the parent alone, one of its workers, all at once, or asked to stop.
KINDS = ("parent", "worker", "all", "stop")


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    with postgres.server() as found:
        yield found


def settings(folder: Path, **changes: Any) -> Path:
    """The search's YAML, beside the run's."""
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    tree = {
        "run": "run.yaml",
        "level": "global",
        "trials": 20,
        "workers": 1,
        "retries": 100,
        "sampler_options": {"round_size": 2, "start_replicates": 2, "confirm": 1},
        **changes,
    }
    file = folder / "search.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def start(config: Path, out: Path, command: str = "run") -> subprocess.Popen[bytes]:
    """The command in a process group of its own; its output goes to OUT.log."""
    flags = [command, "--config", str(config), "--out", str(out)]
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.dist.search_lives", *flags],
            cwd=ROOT,
            # Trials long enough that most kills hit one, rather than what lies between two.
            env={"SEARCH_STEP_S": "0.05", **os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], out: Path) -> None:
    assert process.wait(timeout=900) == 0, out.with_suffix(".log").read_text()[-4000:]


def trials_of(config: Path, out: Path) -> list[FrozenTrial]:
    tree = yaml.safe_load(config.read_text())
    tree["run"] = str(config.with_name("run.yaml"))
    return read(Search(build(SearchSettings, tree), out)).get_trials(deepcopy=False)


def children(parent: int) -> list[int]:
    """The worker processes of a command."""
    try:
        found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return [
            int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
    except FileNotFoundError:
        return []


def kill(process: subprocess.Popen[bytes], kind: str, rng: random.Random) -> None:
    """Do one of KINDS to a command, whichever of its processes are there yet."""
    workers = children(process.pid)
    if kind == "worker" and workers:
        os.kill(rng.choice(workers), signal.SIGKILL)
    elif kind == "stop":
        os.kill(rng.choice([process.pid, *workers]), signal.SIGTERM)
        process.wait(timeout=300)
    elif kind == "parent":
        process.kill()
        process.wait()
    else:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def steps_in(out: Path) -> int:
    """Bytes of metrics in the search's run folders: they grow while something trains."""
    return sum(file.stat().st_size for file in out.glob("trials/*/metrics.jsonl"))


def run_killed(config: Path, out: Path, *, kills: int, seed: int) -> int:
    """Run the search to its end, killed `kills` times on the way; how often it was."""
    rng = random.Random(seed)
    # Every kind as often as the others, in any order.
    kinds = [KINDS[index % len(KINDS)] for index in range(kills)]
    rng.shuffle(kinds)
    process, done = start(config, out), 0
    for kind in kinds:
        began = (out / "study.json").exists()
        before = trials_of(config, out) if began else []
        steps = steps_in(out)
        among_imports = rng.random() < 0.1
        while not among_imports and steps_in(out) == steps and process.poll() is None:
            time.sleep(0.02)
        # Some two trials.
        time.sleep(rng.uniform(0, 2 * STEPS * STEP_S))
        if process.poll() == 0:
            break
        kill(process, kind, rng)
        done += 1
        now = trials_of(config, out) if before else []
        for trial in before:
            if trial.state == TrialState.COMPLETE:
                assert now[trial.number].value == trial.value, "a finished trial was lost"
        if process.poll() is not None:
            process = start(config, out)
    finish(process, out)
    return done


def check_whole(trials: list[FrozenTrial], *, count: int) -> dict[int, dict[str, Any]]:
    """Every trial ended, and every slot has one result; what was run, by slot."""
    assert all(trial.state.is_finished() for trial in trials)
    found: dict[int, dict[str, Any]] = {}
    slot_of: dict[int, int] = {}
    for trial in trials:
        first = trial.system_attrs.get("failed_trial")
        slot = slot_of[trial.number] = (
            len(set(slot_of.values())) if first is None else slot_of[first]
        )
        if trial.state == TrialState.COMPLETE:
            assert slot not in found, "a trial was repeated though it had ended"
            attributes = trial.user_attrs
            found[slot] = {
                "params": trial.params,
                "value": trial.value,
                "replicate": attributes["replicate"],
                "diverged": attributes["diverged"],
                "losses": attributes["losses"],
            }
    assert sorted(found) == list(range(count))
    return found


KILLS = [
    pytest.param(4, 14, id="few"),
    pytest.param(20, 60, id="many", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kills", "count"), KILLS)
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_one_worker_killed_goes_on_as_undisturbed(
    database: str, kills: int, count: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def url() -> str:
        return request.getfixturevalue("server").database() if database == "postgresql" else ""

    config = settings(tmp_path, trials=count, database={"url": url()})
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start(config, undisturbed), undisturbed)
    expected = check_whole(trials_of(config, undisturbed), count=count)
    # Something was found: a search that proposes one point for ever would pass as well.
    assert len({tuple(each["params"].values()) for each in expected.values()}) > count // 2
    config = settings(tmp_path, trials=count, database={"url": url()})
    done = run_killed(config, killed, kills=kills, seed=kills)
    trials = trials_of(config, killed)
    assert check_whole(trials, count=count) == expected
    tries = len(trials) - count
    print(f"{done} kills, {tries} trials repeated")
    assert done == kills
    # Kills that hit nothing prove nothing; some fall between trials, and a parent's death stops its
    # workers only at their next step.
    assert tries >= kills // 4


def test_a_search_outlives_its_database(tmp_path: Path, server: postgres.Server) -> None:
    """The server goes away in the middle and comes back: nothing is lost, nothing is run twice."""
    count = 12
    config = settings(tmp_path, trials=count, workers=2, database={"url": server.database()})
    out = tmp_path / "out"
    process = start(config, out)
    while steps_in(out) == 0:
        assert process.poll() is None, out.with_suffix(".log").read_text()[-4000:]
        time.sleep(0.05)
    server.stop()
    try:
        time.sleep(2.0)  # some ten trials' time
    finally:
        server.start()
    finish(process, out)
    trials = trials_of(config, out)
    check_whole(trials, count=count)
    logs = "".join(file.read_text() for file in out.glob("logs/*.log"))
    assert "the database cannot be reached, next try" in logs
    # A trial that was only just begun is begun again; one that was trained is not.
    ended = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert sum(trial.user_attrs["steps"] for trial in ended) == count * STEPS
