"""Recipes: a file that survives a round trip, what a run gets from it, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_samples import small_tree

from megatron_completedp.config.cli import load_run
from megatron_completedp.config.load import (
    build,
    build_run,
    config_hash,
    load_config,
    to_tree,
    to_yaml,
)
from megatron_completedp.config.recipe import (
    Provenance,
    Recipe,
    load_recipe,
    save_recipe,
)
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.multipliers import (
    DepthProfiles,
    LayerProfiles,
    ModuleMultipliers,
    Multipliers,
)
from megatron_completedp.core.roles import Module
from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.__main__ import PlanFlags, main
from megatron_completedp.plan.run_plan import Plan

MULTIPLIERS = Multipliers(
    types={Module.Q: ModuleMultipliers(lr_mult=3.0, eps_mult=0.1)},
    depth=DepthProfiles(lr_mult=(0.5, 2.0)),
    mlp_residual_mult=0.7,
)
PROVENANCE = Provenance(
    study="small",
    trials=40,
    seeds=(1, 2),
    loss=3.5,
    data={"data/train": "ab" * 32},
    git_commit="1234567",
    created="2026-01-02T03:04:05Z",
)

ROOT = Path(__file__).parents[2]

#: What the sample has from its recipe; the rest stays in the run's own file.
BROUGHT = ("parametrization", "base", "hyperparams", "multipliers")


def proxy(**changes: Any) -> RunConfig:
    """The base of the sample run: half its width and depth, 64 x 100 tokens."""
    own = {
        "base": None,
        "model.num_layers": 2,
        "model.hidden_size": 32,
        "model.ffn_hidden_size": 64,
        "model.num_attention_heads": 4,
        "training": {"global_batch_size": 4, "train_tokens": 6400},
        "hyperparams": {"lr": 0.02, "beta1": 0.8},
    }
    return replace(build(RunConfig, small_tree(**own, **changes)), multipliers=MULTIPLIERS)


def saved(folder: Path, recipe: Recipe | None = None) -> Path:
    path = folder / "recipe.yaml"
    save_recipe(path, recipe or Recipe.of(proxy(), "types_x_depth", PROVENANCE))
    return path


def target_tree(**changes: Any) -> dict[str, Any]:
    """The sample run without the numbers that a recipe brings."""
    own = {name: value for name, value in small_tree().items() if name not in BROUGHT}
    return {**own, **changes}


def written(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def edited(path: Path, change: dict[str, Any]) -> Path:
    """The recipe at `path` with top-level values replaced, or removed where they are None."""
    tree = {**yaml.safe_load(path.read_text(encoding="utf-8")), **change}
    tree = {key: value for key, value in tree.items() if value is not None}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_a_round_trip_keeps_every_number(tmp_path: Path) -> None:
    recipe = Recipe.of(proxy(), "types_x_depth", PROVENANCE)
    again, origin = load_recipe(saved(tmp_path, recipe))
    assert again == recipe
    assert again.sha256 == recipe.sha256 == origin.sha256
    assert not origin.hand_written
    assert recipe.tuned.base == proxy().scale
    assert recipe.modules == proxy().model.modules


def test_a_run_gets_the_recipes_numbers(tmp_path: Path) -> None:
    """The same as the run with all of them written out by hand."""
    saved(tmp_path)
    config = load_config(written(tmp_path, target_tree(recipe="recipe.yaml")))
    by_hand = small_tree(
        base=to_tree(proxy().scale),
        hyperparams={"lr": 0.02, "beta1": 0.8},
        multipliers=to_tree(MULTIPLIERS),
    )
    assert config_hash(config) == config_hash(build(RunConfig, by_hand))
    assert Plan.of(config).resolved == Plan.of(build(RunConfig, by_hand)).resolved
    assert config.recipe is not None
    assert config.recipe.level == "types_x_depth"
    # Negative control: another recipe makes another run.
    other = Recipe.of(replace(proxy(), multipliers=Multipliers()), "types")
    save_recipe(tmp_path / "other.yaml", other)
    path = written(tmp_path, target_tree(recipe="other.yaml"))
    assert config_hash(load_config(path)) != config_hash(config)


def test_at_the_base_a_recipe_changes_nothing(tmp_path: Path) -> None:
    """Recipe of the proxy on the proxy: the search's own run, bit for bit."""
    path = saved(tmp_path)
    tree = target_tree(recipe=str(path), model=to_tree(proxy().model))
    tree["training"] = to_tree(proxy().training)
    assert Plan.of(build_run(tree)).resolved.modules == Plan.of(proxy()).resolved.modules


def test_plan_shows_type_depth_and_ratio_factors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A deeper, wider and longer target, whose 4 layers follow a profile of 2."""
    path = written(tmp_path, target_tree(recipe=saved(tmp_path).name))
    flags = ["--config", str(path), "--training.train-tokens", "25600"]
    assert main(flags) == 0
    text = capsys.readouterr().out
    first = text.splitlines()[0]
    assert first.startswith(f"recipe {tmp_path / 'recipe.yaml'} (level types_x_depth, sha256 ")
    assert "by hand" not in first
    assert main([*flags, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ratios"] == {"m_N": 2, "m_L": 2, "m_B": 2, "m_D": 4}
    rows = {(entry["module"], entry["layer"]): entry for entry in data["modules"]}
    lr = [rows["q", layer]["factors"]["lr"] for layer in range(4)]
    assert {(f["base"], f["type"], f["m_N"], f["m_L"], f["m_D"]) for f in lr} == {
        (0.02, 3.0, 0.5, 1.0, 0.5)
    }
    # 2 layers at 1/4, 3/4; 4 layers at 1/8, 3/8, 5/8, 7/8: the outer two are clamped.
    logs = [math.log2(factors["depth"]) for factors in lr]
    assert logs == pytest.approx([-1, -0.5, 0.5, 1])
    assert rows["k", 0]["factors"]["lr"]["type"] == 1
    assert rows["q", 0]["factors"]["eps"]["type"] == 0.1


def test_a_flag_names_a_recipe_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the working directory as a flag, from the YAML's folder in the YAML; the flag wins."""
    saved(tmp_path)
    (tmp_path / "runs").mkdir()
    path = written(tmp_path / "runs", target_tree())
    monkeypatch.chdir(tmp_path)
    argv = ["--config", str(path), "--recipe", "recipe.yaml"]
    config, _ = load_run(argv, prog="test", description="A test.", extra=PlanFlags)
    assert config.hyperparams.lr == 0.02
    beside = written(tmp_path / "runs", target_tree(recipe="../recipe.yaml"))
    monkeypatch.chdir("/")
    assert config_hash(load_config(beside)) == config_hash(config)
    absent = written(tmp_path / "runs", target_tree(recipe="recipe.yaml"))
    with pytest.raises(ConfigError, match=r"cannot read the config .*runs/recipe\.yaml"):
        load_config(absent)


def test_the_resolved_run_does_not_need_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    config = build_run(target_tree(recipe=str(path)))
    path.unlink()
    resolved = written(tmp_path, yaml.safe_load(to_yaml(config)))
    assert load_config(resolved) == config
    assert config_hash(load_config(resolved)) == config_hash(replace(config, recipe=None))


def test_the_same_value_beside_a_recipe_is_no_conflict(tmp_path: Path) -> None:
    path = str(saved(tmp_path))
    alone = build_run(target_tree(recipe=path))
    beside = target_tree(
        recipe=path,
        hyperparams={"lr": "2e-2"},
        parametrization="completedp",
        multipliers={"types": {"q": {"lr_mult": 3}}},
    )
    assert build_run(beside) == alone


@pytest.mark.parametrize(
    ("given", "difference"),
    [
        ({"hyperparams": {"lr": 0.01}}, "hyperparams.lr is 0.01 in the run and 0.02 in the recipe"),
        ({"parametrization": "sp"}, "parametrization is 'sp' in the run and 'completedp' in the"),
        ({"base": {"num_layers": 4}}, "base.num_layers is 4 in the run and 2 in the recipe"),
        (
            {"multipliers": {"types": {"k": {"lr_mult": 2}}}},
            "multipliers.types.k.lr_mult is 2.0 in the run and 'left out' in the recipe",
        ),
        (
            {"multipliers": {"depth": {"lr_mult": [1, 1]}}},
            "multipliers.depth.lr_mult is [1.0, 1.0] in the run and [0.5, 2.0] in the recipe",
        ),
    ],
)
def test_another_value_beside_a_recipe_names_both(
    tmp_path: Path, given: dict[str, Any], difference: str
) -> None:
    path = saved(tmp_path)
    with pytest.raises(ConfigError) as error:
        build_run(target_tree(recipe=str(path), **given))
    assert difference in str(error.value)
    assert f"the recipe {path} brings rules, base" in str(error.value)


def test_a_flag_that_contradicts_the_recipe_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, target_tree(recipe=saved(tmp_path).name))
    argv = ["--config", str(path), "--lr", "0.5"]
    with pytest.raises(ConfigError, match=r"hyperparams\.lr is 0\.5 in the run and 0\.02"):
        load_run(argv, prog="test", description="A test.", extra=PlanFlags)


def test_many_differences_are_counted(tmp_path: Path) -> None:
    given = {"hyperparams": {"lr": 1, "beta1": 0.1, "beta2": 0.1, "eps": 1, "weight_decay": 1}}
    tree = target_tree(recipe=str(saved(tmp_path)), parametrization="sp", depth_alpha=0.5, **given)
    with pytest.raises(ConfigError, match="and 2 more"):
        build_run(tree)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"activation": "gelu"}, "this model lacks gate. Train"),
        ({"tied_embeddings": True}, "this model lacks unembedding. Train"),
    ],
)
def test_a_recipe_for_other_modules_is_refused(
    tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    tree = target_tree(recipe=str(saved(tmp_path)))
    tree["model"].update(model)
    with pytest.raises(ConfigError, match="was tuned on other modules: ") as error:
        build_run(tree)
    assert message in str(error.value)


def test_a_recipe_without_a_gate_has_nothing_for_one(tmp_path: Path) -> None:
    path = saved(tmp_path, Recipe.of(proxy(**{"model.activation": "gelu"}), "types_x_depth"))
    with pytest.raises(ConfigError, match="the recipe has nothing for this model's gate"):
        build_run(target_tree(recipe=str(path)))
    fits = target_tree(recipe=str(path))
    fits["model"]["activation"] = "gelu"
    build_run(fits)


def test_a_changed_recipe_is_refused_until_its_hash_is_removed(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = load_recipe(path)[0].sha256
    edited(path, {"hyperparams": {"lr": 0.03}})
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    for part in ("was changed after it was written", before, "remove the line `hash:`"):
        assert part in str(error.value)
    recipe, origin = load_recipe(edited(path, {"hash": None}))
    assert recipe.tuned.hyperparams.lr == 0.03
    assert origin.hand_written
    assert "written by hand: its file has no hash" in str(origin)


def test_every_part_of_a_recipe_is_in_its_hash(tmp_path: Path) -> None:
    recipe = Recipe.of(proxy(), "types_x_depth", PROVENANCE)
    tuned = recipe.tuned
    others = [
        replace(recipe, level="full"),
        replace(recipe, modules=(*recipe.modules[::-1],)),
        replace(recipe, provenance=replace(PROVENANCE, loss=3.4)),
        replace(recipe, tuned=replace(tuned, rules=replace(tuned.rules, depth_alpha=0.5))),
        replace(recipe, tuned=replace(tuned, base=replace(tuned.base, batch_tokens=65))),
        replace(recipe, tuned=replace(tuned, multipliers=Multipliers())),
    ]  # fmt: skip
    assert len({other.sha256 for other in [recipe, *others]}) == len(others) + 1
    # A comment or another order of the keys changes no content.
    path = saved(tmp_path, recipe)
    path.write_text("# a comment\n" + yaml.safe_dump(yaml.safe_load(path.read_text())))
    assert load_recipe(path)[0] == recipe


def test_a_short_recipe_by_hand(tmp_path: Path) -> None:
    """All that has to be there; what is left out is at its default."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "version: 1\n"
        "level: global\n"
        "modules: [embedding, q, k, v, final_norm, unembedding]\n"
        "base: {hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, head_dim: 8,\n"
        "       num_layers: 2, batch_tokens: 64, train_tokens: 64e2}\n"
        "hyperparams: {lr: 3e-3}\n",
        encoding="utf-8",
    )
    recipe, origin = load_recipe(path)
    assert recipe.tuned.hyperparams.lr == 0.003
    assert recipe.tuned.multipliers == Multipliers()
    assert origin.hand_written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2; expected a recipe, with version: 1"),
        ({"version": None}, "has version None; expected a recipe"),
        ({"level": "type"}, "level is 'type' (str); expected one of global, types, types_x_depth"),
        ({"level": "types"}, "level is types, but the multipliers are of level types_x_depth"),
        ({"modules": ["k"]}, "the multipliers name q, which is not among modules: k"),
        ({"modules": ["query"]}, "modules[0] is 'query' (str); expected one of embedding"),
        ({"hyperparam": {}}, "unknown key hyperparam; did you mean hyperparams"),
        ({"base": None}, "missing: base.hidden_size"),
        (
            {"multipliers": {"depth": {"lr_mult": [0.5, 1, 2]}}},
            "multipliers.depth.lr_mult has 3 factors; expected one for each of the base's 2",
        ),
        ({"provenance": {"loss": "low"}}, "provenance.loss is 'low' (str); expected a finite"),
    ],
)
def test_bad_recipes(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(edited(saved(tmp_path), change))
    assert message in str(error.value)
    assert "recipe" in str(error.value)


def test_a_recipe_is_not_overwritten(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    saved(tmp_path)  # the same again
    again, _ = load_recipe(path)
    origin = replace(again.provenance, created="2099-01-01T00:00:00+00:00", git_commit="0" * 40)
    save_recipe(path, replace(again, provenance=origin))  # and at another time
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="holds another recipe, which runs may refer to"):
        save_recipe(path, Recipe.of(replace(proxy(), seed=1, multipliers=Multipliers()), "types"))
    assert path.read_bytes() == before
    notes = tmp_path / "notes.yaml"
    notes.write_text("dinner: soup\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="expected a recipe"):
        save_recipe(notes, Recipe.of(proxy(), "types_x_depth"))
    assert notes.read_text(encoding="utf-8") == "dinner: soup\n"


def test_an_unwritable_folder_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be written"):
        save_recipe(tmp_path / "file" / "recipe.yaml", Recipe.of(proxy(), "types_x_depth"))
    saved(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "recipe.yaml"]


def test_the_level_of_an_export_is_at_least_that_of_its_multipliers() -> None:
    """A global search may start from a run that has multipliers of its own."""
    assert Recipe.of(proxy(), "global").level == "types_x_depth"
    assert Recipe.of(proxy(), "full").level == "full"
    layers = Multipliers(layers={Module.Q: LayerProfiles(lr_mult=(0.5, 2.0))})
    assert Recipe.of(replace(proxy(), multipliers=layers), "types").level == "full"


def test_the_readmes_recipe_gives_what_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Recipe\n")[1]
    recipe = section.split("```yaml\n")[1].split("```")[0]
    shown = section.split("```text\n")[1].split("```")[0].splitlines()
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe, encoding="utf-8")
    target = ROOT / "examples/quickstart/target.yaml"
    assert main(["--config", str(target), "--recipe", str(path)]) == 0
    printed = capsys.readouterr().out.replace(str(path), "recipe.yaml").splitlines()
    assert [line for line in shown if line not in (*printed, "...")] == []
