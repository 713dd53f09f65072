"""Print and draw the validation losses of finished runs.

python examples/quickstart/compare.py --out FIGURE.png NAME=RUN_DIR [NAME=RUN_DIR ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from megatron_completedp.config.load import load_config
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.render import text_table
from megatron_completedp.data.jsonl import read_whole_rows
from megatron_completedp.train.metrics import Row


def main() -> int:
    """Read the runs, print the table, write the figure. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN_DIR")
    arguments = parser.parse_args()
    rows, curves = [], {}
    for item in arguments.runs:
        name, _, folder = item.partition("=")
        config = load_config(Path(folder) / "config.yaml")
        metrics = read_whole_rows(Path(folder) / "metrics.jsonl")
        evaluations = [row for row in metrics if row["kind"] == "eval"]
        if not evaluations:
            print(f"error: {folder} has no evaluation yet; train it first", file=sys.stderr)
            return 1
        curves[name] = [(row["step"] * config.batch_tokens, row["loss"]) for row in evaluations]
        rows.append(_row(name, config, evaluations[-1]))
    header = ["run", "parametrization", "parameters", "tokens", "validation loss (nats/token)"]
    print(text_table(header, rows, left=2))
    _draw(curves, arguments.out)
    print(f"\nfigure: {arguments.out}")
    return 0


def _row(name: str, config: RunConfig, last: Row) -> list[str]:
    return [
        name,
        config.rules.parametrization,
        f"{config.model.parameters:,}",
        f"{last['step'] * config.batch_tokens:,}",
        f"{last['loss']:.4f}",
    ]


def _draw(curves: dict[str, list[tuple[int, float]]], out: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, points in curves.items():
        tokens, losses = zip(*points, strict=True)
        axes.plot(tokens, losses, marker="o", markersize=3, label=f"{name}: {losses[-1]:.3f}")
    axes.set(xscale="log", xlabel="tokens", ylabel="validation loss (nats/token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
