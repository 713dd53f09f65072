"""The weights of a checkpoint without its optimizer: read one by one, written, put into a model.

Megatron saves the layers of a model stacked, under one name without the layer number and with the
layer as first dimension; here each layer's tensor has a name of its own. `mcore.checkpoint` has the
whole training state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.utils import unwrap_model
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from megatron_completedp.errors import CheckpointError
from megatron_completedp.mcore.classify import LAYER_NAME
from megatron_completedp.mcore.manifest import write_manifest
from megatron_completedp.mcore.save_request import collect_digests, plan_request, write_here

_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
#: Scaling factors of fp8 in Transformer Engine's layers, and nothing in others.
_NO_WEIGHT = "_extra_state"


class WeightReader:
    """Whole weights of the checkpoint at `path`, whatever layout wrote it.

    Needs `initialize_parallel`, in a single process. Memory of a read: the tensor, and the largest
    shard of it as saved. Raises CheckpointError when `path` holds no Megatron checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            metadata = dist_checkpointing.load_tensors_metadata(str(path))
        except (CheckpointingException, OSError) as error:
            raise CheckpointError(
                f"{path} is not a Megatron checkpoint ({error}); expected a folder step_<n> of a "
                "run's checkpoints."
            ) from error
        self._saved: Mapping[str, ShardedTensor] = metadata

    def dtype(self, name: str) -> torch.dtype:
        """How the weight `name` is stored. Raises CheckpointError when it is not there."""
        return self._find(name)[1].dtype

    def read(self, name: str) -> Tensor:
        """The whole weight `name`, a parameter's name in a model of one process.

        Raises CheckpointError when it is not there.
        """
        layer, saved = self._find(name)
        offsets, shape = [], saved.global_shape
        if layer is not None:
            # Of one layer, as a slice: with `prepend_axis_num` Megatron wants every layer here.
            offsets, shape = [(0, layer, shape[0])], (1, *shape[1:])
        wanted = ShardedTensor.from_rank_offsets(
            saved.key, torch.empty(shape, dtype=saved.dtype), *offsets
        )
        loaded = dist_checkpointing.load(
            {"weight": wanted},
            str(self.path),
            validate_access_integrity=False,  # it asks for every layer at once
        )
        weight: Tensor = loaded["weight"]
        return weight if layer is None else weight[0]

    def _find(self, name: str) -> tuple[int | None, ShardedTensor]:
        """The layer of `name`, and the saved tensor that holds it."""
        key, layer = _stacked(name)
        saved = self._saved.get(key)
        if saved is None or (layer is not None and layer >= saved.global_shape[0]):
            raise CheckpointError(
                f"{self.path} has no weight {name}; it holds "
                f"{', '.join(sorted(k for k in self._saved if not k.startswith('optimizer')))}."
            )
        return layer, saved


def save_weights(folder: Path, weights: Mapping[str, Tensor], num_layers: int) -> None:
    """Add whole `weights`, by parameter name, to the files in `folder`, and a manifest of them all.

    Any layout can load them (`load_model_weights`). Single process. Raises OSError.
    """
    state = {}
    for name, weight in weights.items():
        key, layer = _stacked(name)
        offsets = [] if layer is None else [(0, layer, num_layers)]
        state[name] = ShardedTensor.from_rank_offsets(
            key, weight, *offsets, prepend_axis_num=len(offsets)
        )
    try:
        request = plan_request(state, folder, content_metadata=_METADATA, forked=False)
        write_here(request)
        for finalize in request.finalize_fns:
            finalize()
    except CheckpointException as error:  # what the writers met, a full disk above all
        raise OSError(_reason(error)) from error
    write_manifest(folder, collect_digests(folder))


def load_model_weights(chunks: Sequence[nn.Module], path: Path) -> None:
    """Copy the weights of the checkpoint at `path` into the model of this rank. All ranks call it.

    Layouts and dtypes may differ. Raises CheckpointError when they are of another model.
    """
    metadata: dict[str, Any] = dist_checkpointing.load_content_metadata(str(path)) or {}
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    models: list[Any] = unwrap_model(list(chunks))
    wanted = {
        str(index): {
            name: weight
            for name, weight in model.sharded_state_dict(metadata=metadata).items()
            if not name.endswith(_NO_WEIGHT)
        }
        for index, model in enumerate(models)
    }
    try:
        state = dist_checkpointing.load(wanted, str(path))
    except (CheckpointingException, CheckpointException, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not hold the weights of this model ({_reason(error)}). Give the model "
            "the shape that its config.yaml has."
        ) from error
    for index, model in enumerate(models):
        found = model.load_state_dict(state[str(index)], strict=False)
        lost = [name for name in found.missing_keys if not name.endswith(_NO_WEIGHT)]
        assert not lost, lost
        assert not found.unexpected_keys, found.unexpected_keys


def _reason(error: BaseException) -> str:
    """What happened, without the traceback of every rank that torch puts before it."""
    return str(error).strip().splitlines()[-1]


def _stacked(name: str) -> tuple[str, int | None]:
    """The name under which Megatron saves a parameter, and the parameter's layer."""
    match = LAYER_NAME.fullmatch(name)
    if match is None:
        return name, None
    return f"decoder.layers.{match['tensor']}", int(match["layer"])
