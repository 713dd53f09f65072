"""`python -m megatron_completedp.plan`: every number of a run, and why, without running it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_completedp.config.cli import load_run, run_command
from megatron_completedp.plan.run_plan import Plan

PROG = "python -m megatron_completedp.plan"
DESCRIPTION = """\
Print what a run will train with: for every module the base value, each factor on it (type, depth
profile, m_N, m_L, m_B, m_D) and the result, then the residual multipliers and the budget. Needs
neither torch nor a GPU.

Examples:
  python -m megatron_completedp.plan --config run.yaml --num-layers 48 --json
  python -m megatron_completedp.plan --config run.yaml --recipe recipe.yaml
"""


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """Flags of this command alone."""

    json: bool = False
    """Print one JSON object instead of tables."""


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; its keys are an interface that scripts read.

    `modules` has one entry per module and layer (`layer` is null outside the stack), `residual` one
    per layer, `flops` is 6 x parameters x tokens.
    """
    numbers = plan.resolved.as_json()
    kept = ("parametrization", "depth_alpha", "ratios", "modules", "residual")
    return {
        **{key: numbers[key] for key in kept},
        "parameters": plan.budget.parameters,
        "flops": plan.budget.flops,
        "steps": plan.budget.steps,
    }


def main(argv: Sequence[str]) -> int:
    """Resolve the run that `argv` describes and print it. Returns the exit code."""
    config, flags = load_run(argv, prog=PROG, description=DESCRIPTION, extra=PlanFlags)
    plan = Plan.of(config)
    if flags.json:
        print(json.dumps(plan_json(plan)))
    else:
        print(plan)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
