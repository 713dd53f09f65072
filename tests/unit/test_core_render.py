"""Golden texts: the README's table of rules and two plans.

After an intended change, write them anew and read the difference before committing it:

    PYTHONPATH=. python tests/unit/test_core_render.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_completedp.core.budget import budget
from megatron_completedp.core.hyperparams import BaseHyperparams, Resolved
from megatron_completedp.core.multipliers import DepthProfiles, ModuleMultipliers, Multipliers
from megatron_completedp.core.ratios import Ratios
from megatron_completedp.core.render import all_rules_markdown, layer_ranges, render_plan
from megatron_completedp.core.resolve import resolve
from megatron_completedp.core.roles import Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.core.tables import Rules

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BEGIN, END = "<!-- rules:begin -->\n", "\n<!-- rules:end -->"

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=688,
    num_attention_heads=4,
    head_dim=64,
    vocab_size=50277,
    seq_length=512,
)
BASE = BaseHyperparams(lr=4e-3, eps=1e-8, weight_decay=0.1, beta1=0.9, beta2=0.95)


def small() -> str:
    """A model twice as wide and deep as its base, on twice the batch and four times the tokens."""
    resolved = resolve(SHAPE, Ratios(m_N=2, m_L=2, m_B=2, m_D=4), Rules(), BASE)
    return plan(resolved, SHAPE)


def multipliers() -> str:
    """Type multipliers and two-layer profiles at four layers, every switch off its default.

    A batch ratio of 8 at fixed tokens takes beta1 past the linear rule: the text ends in a note.
    """
    shape = replace(SHAPE, activation="gelu")
    rules = Rules(
        depth_alpha=0.5,
        duration_exponent=0.4,
        final_norm_eps="paper",
        depth_weight_decay="invariant",
    )
    found = Multipliers(
        types={
            Module.EMBEDDING: ModuleMultipliers(lr_mult=4.0, weight_decay_mult=0.5),
            Module.V: ModuleMultipliers(init_std_mult=0.8, one_minus_beta2_mult=1.2),
            Module.DOWN: ModuleMultipliers(eps_mult=0.3),
        },
        depth=DepthProfiles(lr_mult=(0.8, 1.25), mlp_residual_mult=(1.5, 2 / 3)),
        attention_residual_mult=0.9,
    )
    resolved = resolve(shape, Ratios(m_N=2, m_L=2, m_B=8), rules, BASE, found)
    return plan(resolved, shape)


def plan(resolved: Resolved, shape: ModelShape) -> str:
    """The plan of a run of 2**26 tokens in batches of 2**14, as a text file."""
    return render_plan(resolved, budget(shape, batch_tokens=2**14, train_tokens=2**26)) + "\n"


GOLDENS = {
    ROOT / "tests/golden/plan_small.txt": small,
    ROOT / "tests/golden/plan_multipliers.txt": multipliers,
}


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_plan_is_the_golden_text(path: Path) -> None:
    assert GOLDENS[path]() == path.read_text(encoding="ascii")


def test_a_moved_number_is_noticed() -> None:
    """Negative control: one learning rate 1 % off no longer matches."""
    moved = resolve(
        SHAPE, Ratios(m_N=2, m_L=2, m_B=2, m_D=4), Rules(), replace(BASE, lr=BASE.lr * 1.01)
    )
    assert plan(moved, SHAPE) != small()


def test_readme_holds_the_rules_of_the_code() -> None:
    readme = README.read_text(encoding="utf-8")
    assert readme.count(BEGIN) == readme.count(END) == 1
    assert readme.partition(BEGIN)[2].partition(END)[0] == all_rules_markdown()


def test_rules_print_the_papers_cells() -> None:
    """Cells as the paper prints them, so that the golden table is read at least once by eye."""
    lines = all_rules_markdown().partition("**`completedp`**")[2].splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines if " | " in line}
    assert rows["hidden weight (q, k, v, gate, up)"] == (
        "| hidden weight (q, k, v, gate, up) | m_N^-1 | m_N^-1 m_L^(alpha-1) m_S^-1/2 "
        "| m_N^-1 m_L^-alpha m_S^1/2 | m_N m_S^-1/2 |"
    )
    assert rows["QK-norm gain"] == (
        "| QK-norm gain | starts at 1 | m_L^(alpha-1) m_S^-1/2 | m_L^-alpha m_S^1/2 | m_S^-1/2 |"
    )
    assert rows["unembedding weight"] == (
        "| unembedding weight | m_N^-2 | m_N^-1 m_S^-1/2 | m_S^1/2 | m_N m_S^-1/2 |"
    )


@pytest.mark.parametrize(
    ("layers", "text"),
    [([], "-"), ([3], "3"), ([0, 1, 2, 3, 5, 7, 8], "0-3, 5, 7-8"), ([0, 2], "0, 2")],
)
def test_layer_ranges(layers: list[int], text: str) -> None:
    assert layer_ranges(layers) == text


def regenerate() -> None:
    """Write both plans and the README's block from the code."""
    for path, text in GOLDENS.items():
        path.write_text(text(), encoding="ascii")
    readme = README.read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(before + BEGIN + all_rules_markdown() + END + after, encoding="utf-8")


if __name__ == "__main__":
    regenerate()
