"""Ranked layouts on named GPUs, the shipped runs, the ladder, and what a bad request is told."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_completedp.config.cli import load_run
from megatron_completedp.config.load import build_run, read_run
from megatron_completedp.config.run import RunConfig, check_world
from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.__main__ import PlanFlags, main
from megatron_completedp.plan.devices import DEVICES, find_device
from megatron_completedp.plan.ladder import ladder_text
from megatron_completedp.plan.layouts import TIE
from megatron_completedp.plan.ranking import rank_layouts
from megatron_completedp.plan.report import WIDTH, ranking_text
from megatron_completedp.plan.words import reason

TARGETS = Path(__file__).parents[2] / "examples" / "targets"
#: The ladder; what is there for dry runs alone is no rung of it.
RUNS = sorted(path for path in TARGETS.glob("*.yaml") if not path.stem.startswith("dry_run"))
LARGE = TARGETS / "target_7200m.yaml"
H100 = DEVICES["H100"]


def run(name: str) -> RunConfig:
    return build_run(read_run(TARGETS / f"{name}.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
@pytest.mark.parametrize("gpus", [1, 8, 64, 512])
def test_shipped_runs_have_layouts_that_training_takes(path: Path, gpus: int) -> None:
    """On H200s, each of which holds 7.2B parameters; a batch of 64 does not divide 512 times."""
    config = build_run(read_run(path))
    if (path.stem, gpus) == ("proxy_50m", 512):
        with pytest.raises(ConfigError, match="divides into"):
            rank_layouts(config, DEVICES["H200"], gpus=gpus)
        return
    ranking = rank_layouts(config, DEVICES["H200"], gpus=gpus)
    assert ranking.best.fits
    assert all(not layout.fits for layout in ranking.too_large)
    for layout in ranking.fitting:
        training = replace(config.training, micro_batch_size=layout.workload.micro_batch_size)
        check_world(replace(config, parallel=layout.parallel, training=training), gpus)


@pytest.mark.parametrize("samples", [500, 512, 0])
def test_layouts_divide_the_evaluation(samples: int) -> None:
    """500 divides by 4, so that at most 4 replicas can share it; without evaluations 64 may."""
    config = run("target_7200m")
    interval = config.evaluation.interval if samples else 0
    evaluation = replace(config.evaluation, interval=interval, samples=samples or 500)
    ranking = rank_layouts(replace(config, evaluation=evaluation), H100, gpus=64)
    replicas = max(layout.workload.data_parallel_size for layout in ranking.fitting)
    assert replicas == (4 if samples == 500 else 64)


def test_an_evaluation_that_nothing_divides_is_named() -> None:
    config = run("target_7200m")
    config = replace(config, evaluation=replace(config.evaluation, samples=7))
    with pytest.raises(ConfigError, match=r"evaluations of 7 sequences.* 256 is the next number"):
        rank_layouts(config, H100, gpus=512)
    # In a blink: no search from a million downwards.
    with pytest.raises(ConfigError, match="256 is the next number below"):
        rank_layouts(config, H100, gpus=1_000_001)


#: What a YAML may say of a layout that is not the recommended one.
OTHER_LAYOUTS = [
    [],
    ["--tensor-model-parallel-size", "8", "--sequence-parallel"],
    ["--pipeline-model-parallel-size", "4", "--virtual-pipeline-model-parallel-size", "2"],
    ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
    ["--recompute-granularity", "full"],
]


@pytest.mark.parametrize("other", OTHER_LAYOUTS, ids=" ".join)
@pytest.mark.parametrize("gpus", [1, 8, 64, 512])
def test_flags_reproduce_the_layout(gpus: int, other: list[str]) -> None:
    name = "target_1300m"
    best = rank_layouts(run(name), H100, gpus=gpus).best
    given = ["--config", str(TARGETS / f"{name}.yaml"), *other, *best.flags.split()]
    config, _ = load_run(given, prog="x", description="", extra=PlanFlags)
    assert config.parallel == best.parallel
    assert config.training.micro_batch_size == best.workload.micro_batch_size


def test_the_reason_knows_what_makes_a_replica_fit() -> None:
    """7.2B parameters fit on H100s only where ZeRO-1 shards masters and moments, 50M anywhere."""

    def why(name: str, gpus: int) -> str:
        return reason(rank_layouts(run(name), H100, gpus=gpus))

    for gpus in (8, 64, 512):
        assert f"sharded over {gpus} ranks" in why("target_7200m", gpus)
        with pytest.raises(ConfigError, match="do not fit on 1 x H100"):
            why("target_7200m", 1)
    for gpus in (1, 8, 64):
        assert "a whole replica fits on one GPU" in why("proxy_50m", gpus)


def test_a_faster_layout_is_told_where_a_simpler_one_wins() -> None:
    ranking = rank_layouts(run("target_7200m"), H100, gpus=64)
    slower = [item for item in ranking.fitting[1:] if item.cost.step_s > ranking.best.cost.step_s]
    faster = replace(slower[0], cost=replace(slower[0].cost, compute_s=0.0))
    alone = replace(ranking, fitting=(ranking.best, *slower))
    assert "less simple" not in reason(alone)
    assert f"{TIE - 1:.0%} faster exist and are less simple" in reason(
        replace(ranking, fitting=(ranking.best, faster))
    )


@pytest.mark.parametrize("gpus", [8, 512])
def test_the_text_keeps_to_its_width(gpus: int) -> None:
    text = ranking_text(rank_layouts(run("target_7200m"), H100, gpus=gpus))
    assert max(map(len, text.splitlines())) <= WIDTH == 120
    flags = text.partition("flags:\n")[2].replace("\\\n", "")
    assert flags.split() == rank_layouts(run("target_7200m"), H100, gpus=gpus).best.flags.split()


def test_the_command_appends_and_explains(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", str(LARGE)])
    plain = capsys.readouterr().out
    asked = ["--config", str(LARGE), "--gpus", "64", "--gpu", "h100"]
    main([*asked, "--explain"])
    text = capsys.readouterr().out
    assert text.startswith(plain)
    added = text[len(plain) :].splitlines()
    assert max(map(len, added[:13])) <= WIDTH
    assert any(line.startswith("recommended: ") for line in added)
    assert any(line.startswith("because: ") for line in added)
    # The parts of the explanation sum to its totals; each is printed to three or four digits.
    parts = {line.split()[0]: line.split()[-2] for line in added if line.endswith((" GB", " s"))}
    memory = ["parameters", "gradients", "masters", "moments", "activations", "working"]
    assert sum(float(parts[name]) for name in memory) == pytest.approx(
        float(parts["total"]), abs=0.004
    )
    seconds = ["compute", "bubble", "tensor", "pipeline", "data", "update"]
    assert sum(float(parts[name]) for name in seconds) == pytest.approx(
        float(parts["step"]), rel=1e-3
    )


def test_json_has_new_keys_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", str(LARGE), "--json"])
    before = json.loads(capsys.readouterr().out)
    main(["--config", str(LARGE), "--json", "--gpus", "64", "--gpu", "B200"])
    after = json.loads(capsys.readouterr().out)
    hardware = after.pop("hardware")
    assert after == before
    best = hardware["layouts"][0]
    assert best["memory_bytes"]["total"] <= hardware["usable_bytes"]
    hours = before["steps"] * best["cost"]["step_s"] * 64 / 3600
    assert best["gpu_hours"] == pytest.approx(hours)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "8"], "give both"),
        (["--explain"], "--gpu and --gpus"),
        (["--gpus", "8", "--gpu", "V100"], "expected one of A100-80, H100, H200, B200"),
        (["--gpus", "0", "--gpu", "H100"], "at least 1"),
        (["--gpus", "8", "--gpu", "H100", "--utilization", "1.5"], "at most 1"),
        (["--gpus", "8", "--gpu", "H100", "--training.precision", "fp32"], "for bf16"),
        (["--gpus", "7", "--gpu", "H100"], "4 is the next number below"),
        (["--gpus", "1", "--gpu", "H100"], r"GB more than the 77.0 GB.*would do"),
    ],
)
def test_bad_requests_name_the_fix(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--config", str(LARGE), *flags])


def test_what_would_fit_does_fit() -> None:
    """The message of a model that is too large is held to its word."""
    config = run("target_7200m")
    with pytest.raises(ConfigError) as caught:
        rank_layouts(config, H100, gpus=1)
    advice = str(caught.value).split("; ")[-1].split(". ")[-1].removesuffix(" would do.")
    for way in advice.split(" or "):
        count, name = way.split(" x ")
        assert rank_layouts(config, find_device(name), gpus=int(count)).best.fits


def test_best_is_near_the_fastest() -> None:
    ranking = rank_layouts(run("target_1300m"), H100, gpus=512)
    fastest = min(layout.cost.step_s for layout in ranking.fitting)
    assert ranking.best.cost.step_s <= 1.02 * fastest
    rest = [layout.cost.step_s for layout in ranking.fitting[1:]]
    assert rest == sorted(rest)


def test_the_ladder_has_its_rungs() -> None:
    """10x, 100x, about 600x, 1000x and 14,000x the proxy, from one base."""
    configs = {path.stem: build_run(read_run(path)) for path in RUNS}
    lines = [line.split() for line in ladder_text(configs).splitlines()]
    column = lines[0].index("compute")
    rungs = [float(line[column].removesuffix("x").replace(",", "")) for line in lines[1:]]
    # 3%: sizes are whole heads and layers; "600x" is the usual name of 1.3B and 37B tokens.
    assert rungs == pytest.approx([1, 10, 100, 600, 1000, 14_000], rel=0.03)
    proxy = configs["proxy_50m"]
    for name, config in configs.items():
        assert config.hyperparams == proxy.hyperparams, name
        assert config.base == (None if name == "proxy_50m" else proxy.scale), name


def test_the_ladder_refuses_another_base() -> None:
    proxy = run("proxy_50m")
    other = replace(
        proxy,
        model=replace(proxy.model, head_dim=32, num_layers=12),
    )
    with pytest.raises(ConfigError, match="no transfer"):
        ladder_text({"proxy": proxy, "other": other})


def test_every_shipped_run_is_planned_within_two_seconds() -> None:
    """Of processor time, for the largest layout space of each; the rest is a busy machine's."""
    for path in RUNS:
        gpus = "64" if path.stem == "proxy_50m" else "512"
        command = [sys.executable, "-m", "megatron_completedp.plan", "--config", str(path)]
        seconds = []
        for _ in range(2):
            before = _children_seconds()
            subprocess.run(
                [*command, "--gpus", gpus, "--gpu", "H200"], capture_output=True, check=True
            )
            seconds.append(_children_seconds() - before)
            if seconds[-1] < 2:
                break
        assert min(seconds) < 2.0, path.stem


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
