"""The search command's settings, refusals and help; no study is begun."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna")

import optuna
from search_samples import RUN, objective, settings

from megatron_completedp.config.load import build, to_tree
from megatron_completedp.errors import ConfigError
from megatron_completedp.search.__main__ import COMMANDS, main
from megatron_completedp.search.access import sampler_by_slot
from megatron_completedp.search.settings import SearchSettings, database_url
from megatron_completedp.search.trust_region import TrustRegionSampler


def write(folder: Path, **changes: Any) -> Path:
    """search.yaml beside run.yaml."""
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    file = folder / "search.yaml"
    file.write_text(yaml.safe_dump({"run": "run.yaml", "level": "global", **changes}))
    return file


def run(folder: Path, *flags: str, command: str = "run", **changes: Any) -> int:
    config = write(folder, **changes)
    return main([command, "--config", str(config), "--out", str(folder / "out"), *flags])


def test_settings_come_back_from_the_plain_data_that_workers_get() -> None:
    found = settings(bounds={"lr": [-1, 1]}, sampler_options={"round_size": 4})
    assert build(SearchSettings, to_tree(found)) == found


def test_the_study_is_in_the_output_folder_unless_a_url_is_given() -> None:
    assert database_url(settings(), Path("out")) == "sqlite:///out/study.db"
    url = "postgresql+psycopg://host/name"
    assert database_url(settings(database={"url": url}), Path("out")) == url


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"trials": 0}, "trials is 0; expected at least 1"),
        ({"seeds": 0}, "seeds is 0"),
        ({"retries": -1}, "retries is -1"),
        ({"name": ""}, "name is empty"),
        ({"level": "layers"}, "level is 'layers' .*types_x_depth"),
        ({"trails": 3}, "did you mean trials"),
        ({"database": {"heartbeat_s": 60, "grace_s": 90}}, r"at least twice heartbeat_s = 60"),
        ({"database": {"retry_s": -1}}, r"retry_s is -1"),
        ({"database": {"retry_s": 540}}, r"grace_s is 600; expected more than .* = 600"),
        # Of the space, before anything is trained:
        ({"bounds": {"lr": [1, -1]}}, r"bounds\.lr is \[1\.0, -1\.0\]; .* the lower one first"),
        ({"bounds": {"lr": [1, 2]}}, "leaves out 0"),
        ({"bounds": {"lrr": [-1, 1]}}, "did you mean"),
        # Of the sampler:
        ({"sampler": "bayes"}, "sampler 'bayes' is unknown"),
        ({"sampler_options": {"rounds": 3}}, "no setting rounds"),
        ({"sampler_options": {"round_size": 2.5}}, r"round_size=2\.5 must be a whole number"),
        # Of the splits, however they are spelt:
        ({"heldout": ["valid"]}, "heldout has valid, whose tokens data.train or data.valid"),
        ({"heldout": ["other", "./train"]}, "heldout has ./train, whose"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_trained(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        run(tmp_path, **changes)
    assert not (tmp_path / "out" / "trials").exists()


def test_a_base_run_without_a_validation_split_is_refused(tmp_path: Path) -> None:
    config = write(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, "data": {"train": ["train"]}}))
    with pytest.raises(ConfigError, match=r"data\.valid is empty"):
        main(["run", "--config", str(config), "--out", str(tmp_path / "out")])


def test_a_dry_run_shows_the_bounds_and_begins_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    config = Path(__file__).parents[2] / "examples/search/types.yaml"
    assert main(["run", "--config", str(config), "--out", str(out), "--dry-run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # e^-1.5, e^1.5 and the rules' radius of half a nat.
    assert ["types.q.lr_mult", "0.223", "4.48", "1.65"] in lines
    assert lines[-1][:3] == ["types:", "76", "dimensions,"]
    assert not out.exists()


@pytest.mark.parametrize("command", ["status", "recipe"])
def test_a_search_that_was_not_started_has_nothing_to_show(tmp_path: Path, command: str) -> None:
    with pytest.raises(ConfigError, match="start the search"):
        run(tmp_path, command=command)
    assert not (tmp_path / "out" / "study.db").exists(), "looking made a study"


def test_an_unknown_command_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean worker"):
        main(["workers"])


def test_the_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert "Example:" in text
    assert main([]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_its_settings_and_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    own = {"compare": "--judged", "transfer": "--baseline"}.get(command, "--trials")
    for part in (own, "--config", "--out", "Example:"):
        assert part in text
    # What the example gives is what the command takes.
    file = {"compare": "compare.yaml", "transfer": "transfer.yaml"}.get(command, "search.yaml")
    assert f"{command} --config {file} --out runs/" in text


def test_the_readme_lists_the_options_of_the_trust_region() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| (\S+) \|", text, flags=re.MULTILINE)
    listed = {name: value for names, value in rows for name in re.findall(r"`(\w+)`", names)}
    expected = TrustRegionSampler.defaults()
    assert {name: listed.get(name) for name in expected} == {
        name: f"{value:g}" if not isinstance(value, bool) else str(value).lower()
        for name, value in expected.items()
    }


def test_the_usage_needs_neither_torch_nor_optuna() -> None:
    code = (
        "import sys; from megatron_completedp.search.__main__ import main; main(['--help']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'optuna', 'megatron')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_points_differ_by_their_numbers_alone(tmp_path: Path) -> None:
    runs = objective(tmp_path)
    here = [config for _, config in runs.configs({}, name="a", replicate=0)]
    there = [config for _, config in runs.configs({"hyperparams.lr": 1.0}, name="b", replicate=0)]
    assert [config.seed for config in here] == [config.seed for config in there]
    assert there[0].hyperparams.lr == pytest.approx(here[0].hyperparams.lr * 2.71828, rel=1e-5)
    # A run of a study saves at a stop alone, and is evaluated once.
    assert here[0].checkpoint.interval == 0
    assert here[0].evaluation.interval == here[0].steps


def test_every_random_proposal_has_a_seed_of_its_own() -> None:
    """Workers of one seed would all propose the same otherwise, and so would a restarted one."""
    runs = objective(Path("out"))
    of = sampler_by_slot(settings(sampler="random"), runs.space)
    draws = []
    for slot in (0, 1, 0):
        study = optuna.create_study(sampler=of(slot))
        draws.append(study.ask({**runs.space.distributions()}).params)
    assert draws[0] == draws[2] != draws[1]


@pytest.mark.parametrize("name", ["trust_region", "qmc", "turbo"])
def test_what_draws_all_trials_from_one_sequence_has_one_seed(name: str) -> None:
    if name == "turbo":
        pytest.importorskip("botorch")
    of = sampler_by_slot(settings(sampler=name), objective(Path("out")).space)
    assert of(0) is of(1)


@pytest.mark.parametrize(("workers", "warned"), [(16, False), (17, True)])
def test_more_workers_than_a_round_are_warned_of(
    workers: int,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("megatron_completedp.study.crew.Crew.run", lambda self, watch: None)
    assert run(tmp_path, "--workers", str(workers)) == 0
    assert ("round_size is 16" in caplog.text) == warned


def test_the_trust_region_is_told_the_kinds_of_numbers() -> None:
    space = objective(Path("out"), level="types").space
    sampler = sampler_by_slot(settings(level="types"), space)(0)
    assert isinstance(sampler, TrustRegionSampler)
    axes = sampler.axes(space.distributions())
    assert {name: axis.kind for name, axis in axes.items()} == space.trust_region()["kinds"]
    assert axes["types.q.lr_mult"].kind == axes["types.up.lr_mult"].kind == "types.lr"
    assert axes["types.q.eps_mult"].kind == "types.eps"
