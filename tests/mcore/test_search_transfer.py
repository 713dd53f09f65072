"""A tiny search, trained for real, through its report, the comparison and the transfer study."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_completedp.config.load import load_config
from megatron_completedp.config.recipe import Provenance, Recipe, save_recipe
from megatron_completedp.data.manifest import text_hashes
from megatron_completedp.errors import ConfigError
from megatron_completedp.search.heldout import check_heldout, check_unseen
from megatron_completedp.search.space import Space
from megatron_completedp.search.transfer_runs import TransferRuns
from megatron_completedp.search.transfer_settings import SizeSettings, TransferSettings

from .train_runs import ROOT, make_corpus, make_heldout, write_run

TRIALS = 4


def search(command: str, config: Path, *flags: str) -> str:
    """What the command printed; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_completedp.search", command, "--config", config, *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.yaml (10 steps), its data with a held-out split, and search.yaml."""
    folder = tmp_path_factory.mktemp("search")
    corpus = make_corpus(folder / "data")
    heldout = make_heldout(corpus)
    write_run(folder / "base", corpus, training__train_steps=10)
    write(
        folder / "search.yaml",
        {
            "run": "base.yaml",
            "out": str(folder / "out"),
            "level": "types",
            "trials": TRIALS,
            "workers": 2,
            "heldout": [str(heldout)],
        },
    )
    return folder


@pytest.fixture(scope="module")
def searched(folder: Path) -> Path:
    """The output folder of the finished search, with its report."""
    search("run", folder / "search.yaml")
    search("report", folder / "search.yaml", "--target", str(folder / "base.yaml"))
    return folder / "out"


def test_a_search_is_reported(searched: Path) -> None:
    names = {path.name for path in searched.iterdir()}
    expected = {"report.html", "report.json", "trials.jsonl", "progress.png", "cliffs.svg"}
    assert expected | {"multipliers.png"} <= names
    header, *rows = (searched / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(header)["identity"]["space"]["level"] == "types"
    assert len(rows) == TRIALS
    page = (searched / "report.html").read_text(encoding="utf-8")
    assert os.uname().nodename not in "".join(rows)
    assert "device-hours" in page


def test_the_report_is_drawn_again_without_the_database(
    searched: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copy(searched / "trials.jsonl", tmp_path)
    flags = ("--out", str(tmp_path), "--target", str(folder / "base.yaml"))
    search("report", folder / "search.yaml", *flags)
    ours, theirs = (
        json.loads((out / "report.json").read_text(encoding="utf-8"))
        for out in (searched, tmp_path)
    )
    for report in (ours, theirs):
        report.pop("command")
    assert ours == theirs
    assert (tmp_path / "progress.svg").read_bytes() == (searched / "progress.svg").read_bytes()


def test_held_points_are_trained_again_to_be_compared(searched: Path, folder: Path) -> None:
    tree = yaml.safe_load((folder / "search.yaml").read_text(encoding="utf-8"))
    other = write(
        folder / "random.yaml", {**tree, "sampler": "random", "out": str(folder / "random")}
    )
    search("run", other)
    search("report", other)
    config = write(
        folder / "compare.yaml",
        {
            "run": "base.yaml",
            "studies": {"trust_region": ["out/trials.jsonl"], "random": ["random/trials.jsonl"]},
            "samplers": ["trust_region", "random"],
            "budgets": [TRIALS],
            "runs": 5,
            "repeats": 3,
            "seeds": [1],
            "heldout": [str(folder / "data" / "other" / "valid")],
            "workers": 2,
        },
    )
    text = search("compare", config, "--out", str(folder / "compare"))
    assert "gain of trust_region minus that of random, training" in text
    rows = (folder / "compare" / "results.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    # The start, trained once for both, and each one's best point unless that is the start.
    assert 1 <= len(rows) <= 3


@pytest.fixture(scope="module")
def transferred(folder: Path) -> tuple[Path, Path]:
    """The settings and the output folder of a finished transfer study of 8 runs."""
    base = load_config(folder / "base.yaml")
    point = {"types.q.lr_mult": 0.5, "types.embedding.lr_mult": 0.4}
    found = Recipe.of(Space.of(base, "types").apply(base, point), "types")
    save_recipe(folder / "recipe.yaml", found)
    config = write(
        folder / "transfer.yaml",
        {
            "run": "base.yaml",
            "out": str(folder / "transfer"),
            "recipes": {"global": "", "recipe": "recipe.yaml"},
            "sizes": {
                "proxy": {"durations": [1, 2], "reference": 2},
                "target": {"depth": 0.5, "batch": 2, "durations": [2, 4], "reference": 4},
            },
            "heldout": [str(folder / "data" / "other" / "valid")],
            "seeds": [1],
            "workers": 2,
        },
    )
    search("transfer", config)
    return config, folder / "transfer"


def test_recipes_are_trained_at_every_size_and_duration(transferred: tuple[Path, Path]) -> None:
    _, out = transferred
    rows = [
        json.loads(line)
        for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    ]
    keys = {(row["recipe"], row["size"], row["tokens"]) for row in rows}
    assert len(keys) == len(rows) == 8
    for row in rows:
        run = out / "runs" / row["id"]
        metrics = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(metrics[-1])["loss"] == row["loss"] < math.log(512)
        assert load_config(run.with_suffix(".yaml")).data.valid[0].endswith("other/valid")
    for name in ("report.html", "tokens.png", "tokens.svg"):
        assert (out / name).stat().st_size > 1000


def test_a_finished_transfer_study_trains_nothing_again(transferred: tuple[Path, Path]) -> None:
    config, out = transferred
    before = (out / "results.jsonl").read_bytes()
    text = search("transfer", config)
    assert (out / "results.jsonl").read_bytes() == before
    assert "tokens of global over those of recipe, target" in text


def test_a_copy_of_what_trials_had_is_no_heldout_text(folder: Path, tmp_path: Path) -> None:
    """Under another name, by its hash; and whatever the search behind a recipe had."""
    corpus, base = folder / "data", load_config(folder / "base.yaml")
    for file in corpus.glob("valid.*"):
        shutil.copy(file, tmp_path / f"copy{file.suffix}")
    copy, other = str(tmp_path / "copy"), str(corpus / "other" / "valid")
    check_heldout(base.data, (other,))
    with pytest.raises(ConfigError, match=f"heldout has {copy}, whose tokens"):
        check_heldout(base.data, (other, copy))
    provenance = Provenance(data={"old/valid": text_hashes([copy])[copy]})
    check_unseen(provenance, (other,), "recipe.yaml")
    with pytest.raises(ConfigError, match=r"copy, .* behind recipe\.yaml .* as old/valid"):
        check_unseen(provenance, (copy,), "recipe.yaml")
    save_recipe(tmp_path / "r.yaml", Recipe.of(base, "types", replace(provenance, seeds=(5,))))
    settings = TransferSettings(
        run=str(folder / "base.yaml"),
        recipes={"global": "", "recipe": str(tmp_path / "r.yaml")},
        sizes={"proxy": SizeSettings(durations=(1, 2), reference=1)},
        heldout=(copy,),
        seeds=(1,),
    )
    unseen = replace(base, data=replace(base.data, valid=(other,)))
    with pytest.raises(ConfigError, match=r"behind .*r\.yaml trained on or chose by"):
        TransferRuns(settings, unseen, tmp_path)
