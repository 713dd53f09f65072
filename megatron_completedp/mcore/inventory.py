"""Count a model's parameters by module and layer, rank by rank, and hold the sum to its shape."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from megatron_completedp.core.roles import OUTSIDE_STACK, Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ClassificationError
from megatron_completedp.mcore.classify import ClassifiedParameter, partition_dim

#: Elements by (module, global layer); the layer is None outside the stack.
Inventory = Mapping[tuple[Module, int | None], int]


def inventory(parameters: Iterable[ClassifiedParameter]) -> Inventory:
    """Elements on this rank by (module, layer); tied copies belong to the first stage."""
    counts: Counter[tuple[Module, int | None]] = Counter()
    for item in parameters:
        if item.is_tied_copy:
            continue
        columns = math.prod(item.parameter.shape[1:])
        for rows in item.ranges:
            counts[rows.module, item.layer] += (rows.stop - rows.start) * columns
    return dict(counts)


def sum_inventories(ranks: Mapping[tuple[int, int], Inventory]) -> Inventory:
    """Elements of a whole model from the inventories of one replica's ranks.

    Args:
        ranks: inventory by (pipeline rank, tensor rank), every rank of one model replica.

    Shards add over the TP group. Gains are whole on each TP rank and count once.

    Raises:
        ClassificationError: TP ranks of one stage disagree on a tensor each of them should hold.

    """
    total: Counter[tuple[Module, int | None]] = Counter()
    for (stage, tp_rank), counts in ranks.items():
        if counts.keys() != ranks[stage, 0].keys():
            differing = sorted(_label(*key) for key in counts.keys() ^ ranks[stage, 0].keys())
            raise ClassificationError(
                f"Pipeline rank {stage}: only one of TP ranks 0 and {tp_rank} holds "
                f"{', '.join(differing[:8])}; expected the same modules on both. Build every rank "
                "from one configuration."
            )
        for key, elements in counts.items():
            if partition_dim(key[0]) is not None or tp_rank == 0:
                total[key] += elements
    return dict(total)


def check_inventory(total: Inventory, shape: ModelShape) -> None:
    """Compare a whole model's inventory with its shape, module by module and layer by layer.

    Raises:
        ClassificationError: lists each (module, layer) whose count differs.

    """
    expected = {
        (module, layer): shape.module_parameters(module)
        for module in shape.modules
        for layer in ([None] if module in OUTSIDE_STACK else range(shape.num_layers))
    }
    differing = [
        f"{_label(module, layer)}: "
        f"{total.get((module, layer), 0):,} elements, expected {expected.get((module, layer), 0):,}"
        for module, layer in expected.keys() | total.keys()
        if total.get((module, layer), 0) != expected.get((module, layer), 0)
    ]
    if differing:
        raise ClassificationError(
            f"The model has {sum(total.values()):,} parameters; its shape says "
            f"{shape.parameters:,}. Differing modules:\n  "
            + "\n  ".join(sorted(differing)[:20])
            + "\nA parameter was lost or counted twice; build every rank from the same shape."
        )


def _label(module: Module, layer: int | None) -> str:
    return module if layer is None else f"{module} of layer {layer}"
