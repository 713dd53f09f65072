"""A run that follows a recipe, trained: its numbers, its folder, its restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from megatron_completedp.config.load import load_config, to_yaml
from megatron_completedp.config.recipe import Recipe, Tuned, save_recipe
from megatron_completedp.core.hyperparams import BaseHyperparams
from megatron_completedp.core.multipliers import (
    DepthProfiles,
    LayerProfiles,
    ModuleMultipliers,
    Multipliers,
)
from megatron_completedp.core.ratios import Scale
from megatron_completedp.core.roles import Module
from megatron_completedp.plan.run_plan import Plan
from tests.mcore.conftest import Command
from tests.mcore.train_runs import STEPS, losses, make_corpus, write_run

#: Tuned at half the width and depth of the run below, and at half its batch.
RECIPE = Recipe(
    level="full",
    modules=tuple(Module),
    tuned=Tuned(
        base=Scale(
            hidden_size=32,
            ffn_hidden_size=64,
            num_attention_heads=1,
            head_dim=32,
            num_layers=2,
            batch_tokens=256,
            train_tokens=64 * 8 * STEPS,
        ),
        hyperparams=BaseHyperparams(lr=0.01, embedding_init_std=0.5),
        multipliers=Multipliers(
            types={Module.Q: ModuleMultipliers(lr_mult=2.0, init_std_mult=0.5)},
            depth=DepthProfiles(lr_mult=(0.8, 1.25)),
            layers={Module.DOWN: LayerProfiles(eps_mult=(0.5, 2.0))},
            mlp_residual_mult=0.7,
        ),
    ),
)


def test_a_run_trains_with_the_numbers_of_its_recipe(command: Command, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    recipe = tmp_path / "recipe.yaml"
    save_recipe(recipe, RECIPE)
    config = write_run(tmp_path / "run", corpus, model__num_layers=4, checkpoint__interval=5)
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    del tree["hyperparams"]
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")

    assert command(config, "--recipe", str(recipe)) == (0, "")
    folder = tmp_path / "run"
    steps, values = zip(*losses(folder), strict=True)
    assert list(steps) == list(range(1, STEPS + 1))
    assert values[-1] < values[0] - 0.5  # it learns: ln 512 = 6.24 nats at the start

    run = load_config(folder / "config.yaml")
    assert run.recipe is not None
    assert run.recipe.sha256 == RECIPE.sha256
    assert (folder / "plan.txt").read_text().startswith(f"recipe {recipe} (level full, sha256 ")
    q = Plan.of(run).resolved.get(Module.Q, 0)
    assert (q.factors["lr"].type, q.factors["lr"].depth, q.factors["lr"].m_N) == (2.0, 0.8, 0.5)

    # The folder's own config resumes the finished run, with the recipe's file gone.
    recipe.unlink()
    assert command(folder / "config.yaml") == (0, "")
    assert losses(folder) == list(zip(steps, values, strict=True))

    # The same numbers without a recipe: the same run, to the last bit.
    by_hand = replace(run, recipe=None, run_dir=str(tmp_path / "by_hand"))
    (tmp_path / "by_hand.yaml").write_text(to_yaml(by_hand), encoding="utf-8")
    assert command(tmp_path / "by_hand.yaml") == (0, "")
    assert losses(tmp_path / "by_hand") == losses(folder)

    # Negative control: without the multipliers it is another run from the first update on.
    plain = replace(by_hand, multipliers=Multipliers(), run_dir=str(tmp_path / "plain"))
    (tmp_path / "plain.yaml").write_text(to_yaml(plain), encoding="utf-8")
    assert command(tmp_path / "plain.yaml") == (0, "")
    assert losses(tmp_path / "plain") != losses(folder)
