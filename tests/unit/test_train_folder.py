"""Who may use a run's folder, and what lies in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from config_samples import small_tree

from megatron_completedp.config.load import build, load_config
from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.train import folder as run_folder
from megatron_completedp.train.folder import claim, write_plan


def plan_in(folder: Path, **changes: Any) -> Plan:
    return Plan.of(build(RunConfig, small_tree(run_dir=str(folder), **changes)))


def start(plan: Plan) -> Path:
    """What a starting run does with its folder."""
    folder = claim(plan.config)
    write_plan(folder, plan.config, plan.resolved, plan.budget)
    return folder


def test_a_new_folder_is_made_and_holds_the_plan(tmp_path: Path) -> None:
    plan = plan_in(tmp_path / "runs" / "new")
    folder = start(plan)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "plan.json",
        "plan.txt",
    ]
    assert load_config(folder / "config.yaml") == plan.config
    # Through JSON, which turns a tuple into a list.
    assert json.loads((folder / "plan.json").read_text()) == json.loads(
        json.dumps(plan.resolved.as_json())
    )
    assert (folder / "plan.txt").read_text() == f"{plan}\n"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert start(plan_in(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel": {"tensor_model_parallel_size": 2}},
        {"training.micro_batch_size": 2},
        {"checkpoint.interval": 7},
        {"logging.interval": 3},
    ],
    ids=["same", "layout", "micro_batch", "checkpoint", "logging"],
)
def test_the_same_run_is_taken_up_in_any_layout(tmp_path: Path, changes: dict[str, Any]) -> None:
    start(plan_in(tmp_path))
    again = plan_in(tmp_path, **changes)
    assert load_config(start(again) / "config.yaml") == again.config


@pytest.mark.parametrize(
    "changes", [{"hyperparams.lr": 0.02}, {"seed": 7}, {"model.num_layers": 2}]
)
def test_another_run_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    start(plan_in(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"already holds another run.*Choose another run_dir"):
        claim(plan_in(tmp_path, **changes).config)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "changes",
    [
        {"hyperparams.lr": 0.02},
        {"parametrization": "mup"},
        {"multipliers.types": {"q": {"lr_mult": 2.0}}},
    ],
    ids=["hyperparams", "rules", "multipliers"],
)
def test_hyperparameters_may_differ_on_request_and_the_old_config_stays(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    first = plan_in(tmp_path)
    start(first)
    for number, other in enumerate([plan_in(tmp_path, **changes), first], start=1):
        before = load_config(tmp_path / "config.yaml")
        assert claim(other.config, may_change_hyperparams=True) == tmp_path
        write_plan(tmp_path, other.config, other.resolved, other.budget)
        assert load_config(tmp_path / "config.yaml") == other.config
        assert load_config(tmp_path / f"config.{number}.yaml") == before
    assert not (tmp_path / "config.3.yaml").exists()
    # Negative control: anything else still makes another run.
    with pytest.raises(ConfigError, match="already holds another run"):
        claim(plan_in(tmp_path, seed=7, **changes).config, may_change_hyperparams=True)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is not empty and holds no config.yaml.*Choose a new"):
        claim(plan_in(tmp_path).config)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"file/run cannot be made.*Choose a folder"):
        claim(plan_in(tmp_path / "file" / "run").config)


def test_a_start_killed_between_two_files_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_in(tmp_path)
    replace, written = run_folder._replace, []

    def killed_after_one(path: Path, text: str) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        replace(path, text)

    monkeypatch.setattr(run_folder, "_replace", killed_after_one)
    with pytest.raises(KeyboardInterrupt):
        start(plan)
    monkeypatch.undo()
    assert len(list(start(plan).iterdir())) == 3
