"""`python -m megatron_completedp.plan`: every number of a run, and why, without running it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_completedp.config.cli import load_run, run_command
from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.devices import find_device
from megatron_completedp.plan.layouts import Ranking
from megatron_completedp.plan.ranking import rank_layouts
from megatron_completedp.plan.report import explanation, ranking_json, ranking_text
from megatron_completedp.plan.run_plan import Plan

PROG = "python -m megatron_completedp.plan"
DESCRIPTION = """\
Print what a run will train with: for every module the base value, each factor on it (type, depth
profile, m_N, m_L, m_B, m_D) and the result, then the residual multipliers and the budget. With
--gpu and --gpus: the layouts that fit, memory by part, step time, GPU-hours and a recommendation.
Needs neither torch nor a GPU.

Examples:
  python -m megatron_completedp.plan --config run.yaml --num-layers 48 --json
  python -m megatron_completedp.plan --config run.yaml --recipe recipe.yaml
  python -m megatron_completedp.plan --config run.yaml --gpus 512 --gpu H100 --explain
"""


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """Flags of this command alone."""

    json: bool = False
    """Print one JSON object instead of tables."""
    gpus: int | None = None
    """Number of GPUs; with --gpu, rank the layouts that fit on them."""
    gpu: str | None = None
    """One of A100-80, H100, H200, B200."""
    utilization: float = 0.4
    """Part of the bf16 peak that matrix products are expected to reach, 0 to 1."""
    explain: bool = False
    """Print where each number of the recommended layout comes from."""


def plan_json(plan: Plan, ranking: Ranking | None = None) -> dict[str, Any]:
    """The plan as plain data; its keys are an interface that scripts read.

    `modules` has one entry per module and layer (`layer` is null outside the stack), `residual` one
    per layer, `flops` is 6 x parameters x tokens. `hardware` is there when GPUs were named.
    """
    return {
        **plan.resolved.as_json(),
        "parameters": plan.budget.parameters,
        "flops": plan.budget.flops,
        "steps": plan.budget.steps,
        **({"hardware": ranking_json(ranking)} if ranking else {}),
    }


def main(argv: Sequence[str]) -> int:
    """Resolve the run that `argv` describes and print it. Returns the exit code."""
    config, flags = load_run(argv, prog=PROG, description=DESCRIPTION, extra=PlanFlags)
    plan, ranking = Plan.of(config), _ranking(config, flags)
    if flags.json:
        print(json.dumps(plan_json(plan, ranking)))
        return 0
    print(plan)
    if ranking:
        print(f"\n{ranking_text(ranking)}")
        if flags.explain:
            print(f"\n{explanation(ranking, config)}")
    return 0


def _ranking(config: RunConfig, flags: PlanFlags) -> Ranking | None:
    if flags.gpu is None and flags.gpus is None:
        if flags.explain:
            raise ConfigError(
                "--explain explains a layout; name the hardware with --gpu and --gpus."
            )
        return None
    if flags.gpu is None or flags.gpus is None:
        raise ConfigError(
            f"--gpu is {flags.gpu} and --gpus is {flags.gpus}; give both, such as "
            "--gpu H100 --gpus 64."
        )
    device = find_device(flags.gpu)
    return rank_layouts(config, device, gpus=flags.gpus, utilization=flags.utilization)


if __name__ == "__main__":
    sys.exit(run_command(main))
