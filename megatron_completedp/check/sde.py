"""Do batch and duration leave the noise of training as it was? (See `core.tables`.)

Two answers: a noisy quadratic, whose stationary spread is known to a fraction of a percent, under
the numbers that every role of the table gets; and a small model, whose loss must be one curve over
the tokens it has seen, whatever the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_completedp.check import quadratic
from megatron_completedp.check.batch_curves import EVALUATIONS, compare, curve_figure
from megatron_completedp.check.settings import command_line
from megatron_completedp.check.sizes import base_run, small_base
from megatron_completedp.core.ratios import Ratios
from megatron_completedp.core.resolve import resolve
from megatron_completedp.core.roles import Role
from megatron_completedp.core.tables import Parametrization, Rules
from megatron_completedp.core.tables import Table as Rulebook
from megatron_completedp.errors import ConfigError
from megatron_completedp.optim.segments import AdamWValues
from megatron_completedp.study.report import Finding, Report, Table

#: (m_B, m_D) at which the quadratic is held to its base.
POINTS = ((4.0, 1.0), (0.25, 1.0), (1.0, 4.0), (4.0, 4.0))

#: Of the stationary spread; its own sampling error is 0.4 %.
TOLERANCE = 0.02

EXCEPTIONS = (
    "The quadratic's reference in duration is the base's numbers at a batch m_D times as large: "
    "growing the tokens by growing the batch alone changes nothing, and the batch rule leads back.",
    "That argument fixes the duration exponent at 1/2. With another one the quadratic is held to "
    "the batch rule alone.",
    "Curves are compared from three tenths of the tokens on: before, the loss falls along the "
    "gradient rather than by diffusion, and a batch of 4x has taken only a few steps.",
    "A run that has a base itself is trained with the numbers of its own length, for fewer steps: "
    "its ratios stay, and the batch alone moves from there.",
    "fp32, no gradient clipping, constant learning rate without warmup, whatever the run says.",
    "Biases have rows in the table, but this model has none: nothing here measures those rows.",
)


@dataclass(frozen=True, kw_only=True)
class SdeSettings:
    """What the sde check measures."""

    run: str | None = None
    """YAML of the run that is the base; none means a small built-in one on synthetic tokens."""
    parametrization: Parametrization | None = None
    """Rules to check in place of the run's."""
    batches: tuple[float, ...] = (0.25, 1, 4)
    """Ratios of the batch to the base's, at equal tokens; 1 must be one of them."""
    steps: int = 200
    """Steps of the model at the base's batch; ten or more must be left at the largest one."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of weights and data, at least one, over which the model's curves are averaged."""

    def __post_init__(self) -> None:
        if 1 not in self.batches or len(set(self.batches)) < 2:
            raise ConfigError(
                f"batches is {self.batches}; expected 1, the base's, and at least one other ratio."
            )
        if not self.seeds:
            raise ConfigError("seeds is empty; expected at least one, e.g. seeds: [0].")
        largest = max(self.batches)
        if self.steps < EVALUATIONS * largest:
            raise ConfigError(
                f"steps is {self.steps}, which leaves {self.steps / largest:g} at batch x "
                f"{largest:g}; expected {EVALUATIONS} or more there, one before each evaluation. "
                f"Give steps of at least {math.ceil(EVALUATIONS * largest)}, or smaller batches."
            )


def run(settings: SdeSettings, out: Path) -> Report:
    """Simulate the quadratic for every role, and train the model at every batch."""
    from megatron_completedp.check.batch_runs import loss_curves

    base = base_run(settings.run, settings.parametrization)
    rules = base.rules
    # First, because it refuses batches and seeds at once; the quadratic takes none.
    with_rule, without = loss_curves(
        base, out, batches=settings.batches, steps=settings.steps, seeds=settings.seeds
    )
    findings = [*examine(rules), *compare(with_rule, without)]
    return Report(
        title="SDE check",
        question="Do batch and duration leave the noise of training as it was?",
        command=command_line(),
        findings=tuple(findings),
        figures=(curve_figure(with_rule, without),),
        tables=(_table(rules),),
        settings={
            "parametrization": rules.parametrization,
            "duration_exponent": f"{rules.duration_exponent:g}",
            "quadratic": f"lr {quadratic.BASE.lr:g}, decay {quadratic.BASE.weight_decay:g}, betas "
            f"{quadratic.BASE.beta1:g} and {quadratic.BASE.beta2:g}, eps = noise, curvature "
            f"{quadratic.CURVATURE:g} of the noise, {quadratic.CHAINS} chains",
            "model": f"width {base.model.hidden_size}, {settings.steps} steps of "
            f"{base.batch_tokens} tokens at the base",
            "ratios of the base to its own": ", ".join(
                f"{name} {value:g}" for name, value in vars(base.ratios).items()
            ),
            "batch ratios": ", ".join(f"{ratio:g}" for ratio in settings.batches),
            "seeds": ", ".join(map(str, settings.seeds)),
        },
        exceptions=EXCEPTIONS,
    )


def examine(
    rules: Rules,
    table: Rulebook | None = None,
    *,
    points: Sequence[tuple[float, float]] = POINTS,
) -> Iterator[Finding]:
    """The quadratic's spread over its reference, for every role that a model has and each point.

    `table` replaces the one that `rules` select. Duration needs the exponent 1/2.
    """
    for m_B, m_D in points:
        if m_D != 1 and rules.duration_exponent != 0.5:
            continue
        for role, adamw in role_values(rules, Ratios(m_B=m_B, m_D=m_D), table).items():
            yield Finding(
                what=f"quadratic: spread for {role} at m_B {m_B:g}, m_D {m_D:g} over its reference",
                value=_spread(adamw, m_B) / _reference(rules, role, m_D),
                low=1 - TOLERANCE,
                high=1 + TOLERANCE,
            )


def role_values(
    rules: Rules, ratios: Ratios, table: Rulebook | None = None
) -> dict[Role, AdamWValues]:
    """AdamW's numbers for each role, as `resolve` gives them to a module of it."""
    shape = small_base().model
    resolved = resolve(shape, ratios, rules, quadratic.BASE, table=table)
    return {entry.role: quadratic.values(entry) for entry in resolved.modules}


def _spread(adamw: AdamWValues, m_B: float) -> float:
    return quadratic.stationary_std(adamw, quadratic.NOISE / m_B**0.5)


def _reference(rules: Rules, role: Role, m_D: float) -> float:
    """The base's numbers at a batch of m_D times the base's, which is as long in steps."""
    return _spread(role_values(rules, Ratios())[role], m_D)


def _table(rules: Rules) -> Table:
    rows = []
    for m_B, m_D in POINTS:
        adamw = role_values(rules, Ratios(m_B=m_B, m_D=m_D))[Role.HIDDEN_WEIGHT]
        reference = _reference(rules, Role.HIDDEN_WEIGHT, m_D)
        numbers = (adamw.lr, adamw.weight_decay, adamw.eps, adamw.beta1, adamw.beta2)
        cells = (*(f"{number:.4g}" for number in numbers), f"{_spread(adamw, m_B):.5f}")
        rows.append((f"m_B {m_B:g}, m_D {m_D:g}", *cells, f"{reference:.5f}"))
    return Table(
        title="The quadratic of a hidden weight",
        header=("", "lr", "decay", "eps", "beta1", "beta2", "spread", "reference"),
        rows=tuple(rows),
    )
