"""`python -m megatron_completedp.plan.ladder`: several runs as rungs of compute above the first."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_completedp.config.cli import run_command
from megatron_completedp.config.load import build_run, read_run
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.budget import Budget, budget
from megatron_completedp.core.ratios import ratios_between
from megatron_completedp.core.render import text_table
from megatron_completedp.errors import ConfigError

DESCRIPTION = """\
Print runs as a ladder: sizes, FLOPs (6 N D), the compute of each over the smallest one's, and its
four ratios to it. All must be transfers of one base: width by heads, head_dim fixed, d_ff in
proportion.

Example:
  python -m megatron_completedp.plan.ladder examples/targets/*.yaml
"""

_HEADER = ["run", "parameters", "tokens", "hidden", "heads", "layers", "d_ff"]
_HEADER += ["batch", "FLOPs", "compute", "m_N", "m_L", "m_B", "m_D"]


@dataclass(frozen=True, kw_only=True)
class LadderFlags:
    """Arguments of this command."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """YAML files of runs, in any order."""


def ladder_text(runs: dict[str, RunConfig]) -> str:
    """The table of `runs` by name, in order of compute.

    Raises ConfigError when they are none, or when one is no transfer of the smallest.
    """
    if not runs:
        raise ConfigError("no run was given; expected one YAML file or more.")
    budgets = {name: _budget(config) for name, config in runs.items()}
    names = sorted(runs, key=lambda name: budgets[name].flops)
    base = names[0]
    rows = []
    for name in names:
        shape, cost = runs[name].model, budgets[name]
        try:
            ratios = ratios_between(runs[base].scale, runs[name].scale)
        except ConfigError as error:
            raise ConfigError(f"{name} is no transfer of {base}: {error}") from error
        rows.append(
            [
                Path(name).stem,
                f"{cost.parameters / 1e6:,.1f}M",
                f"{cost.train_tokens / 1e9:.2f}B",
                *map(str, (shape.hidden_size, shape.num_attention_heads, shape.num_layers)),
                str(shape.ffn_hidden_size),
                f"{cost.batch_tokens:,}",
                f"{cost.flops:.3g}",
                f"{cost.flops / budgets[base].flops:,.4g}x",
                *(f"{number:.4g}" for number in (ratios.m_N, ratios.m_L, ratios.m_B, ratios.m_D)),
            ]
        )
    return text_table(_HEADER, rows)


def _budget(config: RunConfig) -> Budget:
    return budget(config.model, batch_tokens=config.batch_tokens, train_tokens=config.train_tokens)


def main(argv: Sequence[str]) -> int:
    """Print the ladder of the files in `argv`. Returns the exit code."""
    prog = "python -m megatron_completedp.plan.ladder"
    flags = tyro.cli(LadderFlags, prog=prog, description=DESCRIPTION, args=list(argv))
    print(ladder_text({str(path): build_run(read_run(path)) for path in flags.runs}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
