"""A run's numbers before anything is built: what `plan` prints and `train` logs and follows."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.budget import Budget, budget
from megatron_completedp.core.hyperparams import Resolved
from megatron_completedp.core.render import render_plan
from megatron_completedp.core.resolve import resolve


@dataclass(frozen=True)
class Plan:
    """A configuration with everything that follows from it."""

    config: RunConfig
    resolved: Resolved
    budget: Budget

    @classmethod
    def of(cls, config: RunConfig) -> Plan:
        """Resolve `config`; raises what `core.resolve.resolve` raises."""
        return cls(
            config=config,
            resolved=resolve(
                config.model, config.ratios, config.rules, config.hyperparams, config.multipliers
            ),
            budget=budget(
                config.model, batch_tokens=config.batch_tokens, train_tokens=config.train_tokens
            ),
        )

    def __str__(self) -> str:
        """The tables that `python -m megatron_completedp.plan` prints."""
        tables = render_plan(self.resolved, self.budget)
        return f"{self.config.recipe}\n{tables}" if self.config.recipe else tables
