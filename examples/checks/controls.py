"""Measure and draw the checks' negative controls: the right table beside a wrong one, four times.

python examples/checks/controls.py     # about two minutes on one core

Writes negative_controls.jsonl and negative_controls.png into the folder of this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_completedp.check import eps, quadratic, sde
from megatron_completedp.check.measure import Bench, Key, Ladder, slopes
from megatron_completedp.check.mutation import Cell, mutated
from megatron_completedp.check.sizes import small_base
from megatron_completedp.core.ratios import Ratios
from megatron_completedp.core.roles import Role
from megatron_completedp.core.tables import Rules, Table, build_table
from megatron_completedp.study.plot import COLORS, STYLE, label_lines, log2_axis

HERE = Path(__file__).parent
SEEDS = (0, 1)
RATIOS = (1.0, 2.0, 4.0)
STEP = 5

#: Panel title, axis label, label of the vertical axis.
PANELS = (
    ("What step 5 has changed in q", "width over the base's", "RMS contribution"),
    ("Embedding update, eps at the gradient", "width over the base's", "RMS update"),
    ("Noisy quadratic", "batch over the base's", "stationary spread"),
    ("Residual stream, change at step 5", "depth over the base's", "RMS change"),
)


def lines() -> Iterator[dict]:
    """One line of the figure after the other: panel, label, ratios and values."""
    sp = build_table(Rules(parametrization="sp"))
    no_multiplier = _changed("global", "residual_multiplier", "m_L", 1)
    no_eps_rule = _changed("embedding", "eps", "m_N", 1)
    width = Ladder(axis="width", ratios=RATIOS, seeds=SEEDS)
    depth = Ladder(axis="depth", ratios=RATIOS, seeds=SEEDS)
    base = small_base()
    with Bench(base, None, steps=(0, STEP)) as bench:
        key = Key("contribution", "q", "layers", STEP)
        yield _line(0, "completedp", bench, width, key)
        yield _line(0, "sp", bench, width, key, sp)
        key = Key("change", "residual", "last", STEP)
        yield _line(3, "completedp", bench, depth, key)
        yield _line(3, "no multiplier", bench, depth, key, no_multiplier)
    near = eps.eps_at_gradient(base)
    with Bench(near, None, steps=eps.STEPS) as bench:
        key = Key("update", "embedding", "", 0)
        yield _line(1, "completedp", bench, width, key)
        yield _line(1, "no eps rule", bench, width, key, no_eps_rule)
    yield _spreads("completedp", None)
    # eps ~ m_S^1/2 turned into m_S^-1/2.
    wrong_sign = mutated(_changed("embedding", "eps", "m_B", 1), _eps("m_D"), Fraction(-1))
    yield _spreads("wrong eps sign", wrong_sign)


def draw(measured: list[dict]) -> Figure:
    """The four panels."""
    figure = Figure(figsize=(9, 6.4))
    panels: list[Axes] = list(figure.subplots(2, 2).flat)
    for line in measured:
        wrong = line["label"] != "completedp"
        panels[line["panel"]].plot(
            line["ratios"], line["values"], "o-", label=line["label"], color=COLORS[wrong]
        )
    for axes, (title, x, y) in zip(panels, PANELS, strict=True):
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_yscale("log", base=2)
        log2_axis(axes, axes.get_lines()[0].get_xdata())
        label_lines(axes)
    return figure


def _line(
    panel: int, label: str, bench: Bench, ladder: Ladder, key: Key, table: Table | None = None
) -> dict:
    _, points = slopes(bench, ladder, table=table)
    values = [2 ** points[key][ratio] for ratio in ladder.ratios]
    return {"panel": panel, "label": label, "ratios": ladder.ratios, "values": values}


def _spreads(label: str, table: Table | None) -> dict:
    ratios, values = (0.5, 1.0, 2.0, 4.0), []
    for ratio in ratios:
        adamw = sde.role_values(Rules(), Ratios(m_B=ratio), table)[Role.EMBEDDING]
        values.append(quadratic.stationary_std(adamw, quadratic.NOISE / ratio**0.5))
    return {"panel": 2, "label": label, "ratios": ratios, "values": values}


def _changed(row: str, column: str, symbol: str, change: int) -> Table:
    return mutated(build_table(Rules()), Cell(row, column, symbol), Fraction(change))


def _eps(symbol: str) -> Cell:
    return Cell("embedding", "eps", symbol)


def main() -> None:
    """Measure, write the numbers, draw."""
    measured = list(lines())
    text = "".join(json.dumps(line) + "\n" for line in measured)
    (HERE / "negative_controls.jsonl").write_text(text, encoding="utf-8")
    with mpl.rc_context(STYLE):
        draw(measured).savefig(HERE / "negative_controls.png", dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
