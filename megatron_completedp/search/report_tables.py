"""The tables of a search's report."""

from __future__ import annotations

import math
from collections.abc import Mapping

import optuna

from megatron_completedp.search.access import Search
from megatron_completedp.search.history import Estimate
from megatron_completedp.search.importance import Importance
from megatron_completedp.search.ledger import ENDS, Ledger
from megatron_completedp.search.report_figures import short
from megatron_completedp.search.space import Space
from megatron_completedp.study.report import Table

#: Changes of the best point that the table names.
LISTED = 12


def loss_table(start: Estimate, best: Estimate) -> Table:
    """Losses of the base run and of the best point."""
    rows = []
    for name, each in (("base run", start), ("best point", best)):
        rows.append((name, f"{each.mean:.4f}", f"{each.interval:.4f}", str(each.runs)))
    return Table(
        title="Loss",
        header=("point", "validation loss", "95 % interval", "runs"),
        rows=tuple(rows),
        note=(
            f"Nats per token. One run scatters by {best.noise:.4f} over seeds "
            f"({best.freedom} degrees of freedom)."
        ),
    )


def changes_table(point: Mapping[str, float], space: Space, weights: Importance | None) -> Table:
    """What the best point multiplies most, and all that lies on a bound."""
    on_bound = space.on_bounds(point)
    bounds = {item.name: (item.low, item.high) for item in space.dimensions}
    ranked = sorted(point.items(), key=lambda item: (item[0] not in on_bound, -abs(item[1])))
    rows = []
    for name, value in ranked[: max(LISTED, len(on_bound))]:
        part = "-" if weights is None else f"{weights.nats[name]:.4f}"
        low, high = (f"{math.exp(bound):.3g}" for bound in bounds[name])
        within = f"{low} to {high}" + (", on it" if name in on_bound else "")
        factor, octaves = f"{math.exp(value):.3g}", f"{value / math.log(2):+.2f}"
        rows.append((short(name), factor, octaves, within, part))
    return Table(
        title="Largest changes",
        header=("dimension", "factor", "log2", "bounds", "importance"),
        rows=tuple(rows),
        note="Of the best point against the base run, those on their bounds first; a large change "
        "need not matter.",
    )


def cost_table(search: Search, study: optuna.Study, target: str | None) -> Table:
    """What became of the tries, and what they cost, against the run in the YAML `target`."""
    ledger = Ledger.of(study.get_trials(deepcopy=False), ranks=search.settings.ranks)
    rows = []
    for end in ENDS:
        if entries := [entry for entry in ledger.entries if entry.end == end]:
            flops = sum(entry.flops for entry in entries)
            seconds = sum(entry.device_seconds for entry in entries)
            rows.append((end, str(len(entries)), f"{flops:.3g}", f"{seconds / 3600:.2f}"))
    total = (f"{ledger.flops:.3g}", f"{ledger.device_seconds / 3600:.2f}")
    rows.append(("in all", str(len(ledger.entries)), *total))
    note = (
        "FLOPs are 6 x parameters x trained tokens, without evaluation; device-hours have all. "
        "Tries that were repeated, diverged or stopped are included, held-out runs of the recipe "
        "are not."
    )
    if target is not None:
        share, flops = ledger.share_of(target)
        note += f" That is {share:.3g} of the {flops:.3g} FLOPs of {target}."
    return Table(
        title="Cost",
        header=("tries", "count", "FLOPs", "device-hours"),
        rows=tuple(rows),
        note=note,
    )
