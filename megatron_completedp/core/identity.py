"""Did a hyperparameter move between two tables? Compares them number by number.

A resumed run must train with the numbers it was saved with, unless the user named the change.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_completedp.core.render import layer_ranges, text_table
from megatron_completedp.core.roles import Module
from megatron_completedp.errors import CheckpointError, ConfigError

#: What trains a module after step 0; init_std has done its work by then.
MODULE_FIELDS = ("lr", "weight_decay", "eps", "beta1", "beta2")
RESIDUAL_FIELDS = ("attention", "mlp")

_NAMES = (
    *(f"{module}.{field}" for module in Module for field in MODULE_FIELDS),
    *(f"residual.{field}" for field in RESIDUAL_FIELDS),
    "logit.multiplier",
    *(f"*.{field}" for field in (*MODULE_FIELDS, *RESIDUAL_FIELDS, "multiplier")),
)


@dataclass(frozen=True)
class Change:
    """One number that differs."""

    module: str
    """A module, or `residual` or `logit` for the multipliers in the forward pass."""
    layer: int | None
    field: str
    saved: float
    now: float

    @property
    def names(self) -> frozenset[str]:
        """What allows it: `module.field`, or `*.field` for every module at once."""
        return frozenset({f"{self.module}.{self.field}", f"*.{self.field}"})


def check_names(names: Iterable[str]) -> frozenset[str]:
    """`names` as a set. Raises ConfigError for one that is no module.field."""
    given = frozenset(names)
    for name in sorted(given):
        if name not in _NAMES:
            near = difflib.get_close_matches(name, _NAMES) or ["q.lr", "*.weight_decay"]
            raise ConfigError(
                f"--allow-hp-change {name}: expected module.field, such as {' or '.join(near)}. "
                f"Fields are {', '.join(MODULE_FIELDS)}; residual.attention, residual.mlp and "
                "logit.multiplier can be named too."
            )
    return given


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The numbers that differ between two tables in the form of `Resolved.as_json`.

    Raises CheckpointError when the tables are of different models.
    """
    before, after = dict(_numbers(saved)), dict(_numbers(now))
    if before.keys() != after.keys():
        module, layer, _ = sorted(before.keys() ^ after.keys(), key=str)[0]
        where = module if layer is None else f"{module} in layer {layer}"
        raise CheckpointError(
            f"the checkpoint is of another model: only one of the two has {where}. Resume with "
            "the model it was written with."
        )
    return [Change(*key, before[key], after[key]) for key in before if before[key] != after[key]]


def check_changes(
    saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str]
) -> list[Change]:
    """The differences between two tables, each of which `allowed` must name.

    Raises CheckpointError with the table of those that it does not name.
    """
    found = changes(saved, now)
    refused = [change for change in found if change.names.isdisjoint(allowed)]
    if refused:
        names = dict.fromkeys(f"{change.module}.{change.field}" for change in refused)
        flags = " ".join(f"--allow-hp-change {name}" for name in names)
        raise CheckpointError(
            f"the checkpoint was written with other hyperparameters:\n{describe(refused)}\n"
            f"Resume with those it was written with, or name each change: {flags}"
        )
    return found


def describe(found: Sequence[Change]) -> str:
    """A table of changes for people; layers with the same change share a line."""
    layers: dict[tuple[str, str, float, float], list[int]] = {}
    for change in found:
        key = (change.module, change.field, change.saved, change.now)
        where = layers.setdefault(key, [])
        if change.layer is not None:
            where.append(change.layer)
    rows = [
        [module, layer_ranges(where), field, repr(saved), repr(now)]
        for (module, field, saved, now), where in layers.items()
    ]
    return text_table(["module", "layers", "field", "saved", "now"], rows, left=3)


def _numbers(table: Mapping[str, Any]) -> Iterator[tuple[tuple[str, int | None, str], float]]:
    """Every number that acts after step 0, by (module, layer, field)."""
    for entry in table["modules"]:
        for field in MODULE_FIELDS:
            yield (entry["module"], entry["layer"], field), entry[field]
    for entry in table["residual"]:
        for field in RESIDUAL_FIELDS:
            yield ("residual", entry["layer"], field), entry[field]
    yield ("logit", None, "multiplier"), table["logit_multiplier"]
