"""Initial weights: one model for every layout, each module from its own stream and std."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.core.hyperparams import ResidualMultiplier
from megatron_completedp.core.roles import GAIN_ROLES, MODULE_ROLES, Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import HyperparamError
from megatron_completedp.mcore.classify import ClassifiedParameter, classify_model
from megatron_completedp.mcore.draw import draw_weight
from megatron_completedp.mcore.init import InitStd, initialize_parameters, local_slice
from megatron_completedp.mcore.model import Precision, build_model
from megatron_completedp.mcore.platform import CpuPlatform
from megatron_completedp.mcore.simulated_rank import simulated_rank

# Heads and groups differ, and so do all sizes, so that a transposed or misplaced block shows.
SHAPE = ModelShape(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=4,
    vocab_size=250,
    seq_length=8,
)
#: A std of its own for each module, so that rows drawn with a neighbour's std would show.
STDS = {module: 0.01 * (index + 1) for index, module in enumerate(Module)}


def init_std(module: Module, layer: int | None) -> float | None:
    return None if MODULE_ROLES[module] in GAIN_ROLES else STDS[module]


def build_rank(
    rank: int = 0,
    parallel: ParallelConfig | None = None,
    *,
    shape: ModelShape = SHAPE,
    std: InitStd = init_std,
    seed: int = 1,
    data_parallel_size: int = 1,
    precision: Precision = "fp32",
) -> tuple[tuple[int, int], list[ClassifiedParameter]]:
    """The rank's (pp, tp) coordinate and its initialized parameters."""
    parallel = parallel or ParallelConfig()
    with simulated_rank(rank, parallel.model_parallel_size * data_parallel_size, parallel):
        chunks = build_model(
            shape,
            parallel,
            platform=CpuPlatform(),
            precision=precision,
            residual=[
                ResidualMultiplier(layer=layer, attention=1.0, mlp=1.0)
                for layer in range(shape.num_layers)
            ],
        )
        parameters = classify_model(chunks, shape, parallel)
        initialize_parameters(parameters, shape, std, seed=seed)
        coordinate = (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
    return coordinate, list(parameters)


def tensors(parameters: list[ClassifiedParameter]) -> dict[str, Tensor]:
    return {item.global_name: item.parameter.detach() for item in parameters}


def whole(name: str, shards: list[Tensor]) -> Tensor:
    """Join TP shards as Megatron's layers use them, without asking the code under test."""
    if "norm" in name:
        assert all(torch.equal(shard, shards[0]) for shard in shards)
        return shards[0]
    if name.endswith("linear_fc1.weight"):  # each rank holds [its gate; its up]
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    columns = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    return torch.cat(shards, dim=1 if columns else 0)


def q_rows(fused: Tensor) -> Tensor:
    """Query rows of a whole linear_qkv: the first two of each group's four head blocks."""
    blocks = fused.reshape(SHAPE.kv_heads, 4, SHAPE.head_dim, SHAPE.hidden_size)
    return blocks[:, :2].reshape(-1, SHAPE.hidden_size)


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "chunks", "dp_size"),
    [(2, 1, None, 1), (4, 1, None, 1), (1, 2, None, 2), (2, 2, 2, 1)],
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_layout_starts_from_the_same_weights(
    tp_size: int, pp_size: int, chunks: int | None, dp_size: int, tied: bool
) -> None:
    shape = ModelShape(**{**vars(SHAPE), "tied_embeddings": tied})
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        virtual_pipeline_model_parallel_size=chunks,
    )
    expected = tensors(build_rank(shape=shape)[1])
    shards: dict[str, dict[int, Tensor]] = {}
    for rank in range(tp_size * pp_size * dp_size):
        (_, tp_rank), parameters = build_rank(
            rank, parallel, shape=shape, data_parallel_size=dp_size
        )
        for name, tensor in tensors(parameters).items():
            replica = shards.setdefault(name, {}).setdefault(tp_rank, tensor)
            assert torch.equal(replica, tensor), "data-parallel replicas differ"
    if tied and pp_size > 1:  # the last stage's copy; one process has a single tensor instead
        expected["output_layer.weight"] = expected["embedding.word_embeddings.weight"]
    assert shards.keys() == expected.keys()
    for name, by_rank in shards.items():
        found = whole(name, [by_rank[tp_rank] for tp_rank in range(tp_size)])
        assert torch.equal(found, expected[name]), name


def test_rows_of_a_fused_weight_are_the_modules_own_draws() -> None:
    values = tensors(build_rank()[1])
    q = draw_weight(Module.Q, 2, SHAPE, STDS[Module.Q], seed=1)
    assert torch.equal(q_rows(values["decoder.layers.2.self_attention.linear_qkv.weight"]), q)
    gate, up = values["decoder.layers.2.mlp.linear_fc1.weight"].chunk(2)
    assert torch.equal(gate, draw_weight(Module.GATE, 2, SHAPE, STDS[Module.GATE], seed=1))
    assert torch.equal(up, draw_weight(Module.UP, 2, SHAPE, STDS[Module.UP], seed=1))


def test_every_parameter_is_set_and_gains_are_one() -> None:
    for item in build_rank()[1]:
        # The engine leaves weights NaN, so one that init forgot would show here.
        assert torch.isfinite(item.parameter).all(), item.global_name
        if item.partition_dim is None:
            assert (item.parameter == 1).all(), item.global_name


def test_layers_modules_and_seeds_draw_apart() -> None:
    # Equal shapes, so that only the stream can tell them apart.
    streams = [(Module.K, 0, 1), (Module.V, 0, 1), (Module.K, 1, 1), (Module.K, 0, 2)]
    draws = [draw_weight(m, layer, SHAPE, 1.0, seed=seed) for m, layer, seed in streams]
    for index, left in enumerate(draws):
        for right in draws[:index]:
            # Independent unit normals of n elements correlate by 1/sqrt(n) = 0.036; 5 sigma.
            correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]
            assert abs(correlation) < 5 / left.numel() ** 0.5


def test_draws_are_the_same_in_every_process() -> None:
    # Written down from another process: Python's own hash() would differ between two of them.
    draw = draw_weight(Module.DOWN, 1, SHAPE, 1.0, seed=7)
    pinned = [-0.00243274, 0.64388126, 0.92800468]
    assert draw[0, :3].tolist() == pytest.approx(pinned, abs=1e-8)  # as many digits as written


@pytest.mark.parametrize("module", [Module.EMBEDDING, Module.Q, Module.DOWN])
def test_the_measured_std_is_the_asked_one(module: Module) -> None:
    draw = draw_weight(module, None, SHAPE, 0.3, seed=3)
    # The std of n normal samples is off by 1/sqrt(2n) relative; 5 sigma. n >= 1,536: 9 % or less.
    tolerance = 5 / (2 * draw.numel()) ** 0.5
    assert draw.std().item() == pytest.approx(0.3, rel=tolerance)
    assert abs(draw.mean().item()) < 5 * 0.3 / draw.numel() ** 0.5


def test_another_std_for_q_scales_q_and_moves_nothing_else() -> None:
    def doubled(module: Module, layer: int | None) -> float | None:
        return 2 * STDS[module] if module is Module.Q else init_std(module, layer)

    before, after = tensors(build_rank()[1]), tensors(build_rank(std=doubled)[1])
    for name, tensor in before.items():
        if name.endswith("linear_qkv.weight"):
            # Doubling is exact in binary floating point.
            assert torch.equal(q_rows(after[name]), 2 * q_rows(tensor))
            changed = (after[name] != tensor).any(dim=1).sum()
            assert changed == SHAPE.num_attention_heads * SHAPE.head_dim
        else:
            assert torch.equal(after[name], tensor), name


def test_another_seed_is_another_model() -> None:
    # Negative control of the equalities above.
    first, second = tensors(build_rank()[1]), tensors(build_rank(seed=2)[1])
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) == ("norm" in name), name


def test_bf16_is_the_fp32_draw_rounded() -> None:
    exact, rounded = tensors(build_rank()[1]), tensors(build_rank(precision="bf16")[1])
    for name, tensor in exact.items():
        assert rounded[name].dtype == torch.bfloat16
        assert torch.equal(rounded[name], tensor.bfloat16()), name


def test_slices_follow_the_split_of_each_layer() -> None:
    full = torch.arange(24.0).reshape(4, 6)
    assert torch.equal(local_slice(full, Module.O, tp_rank=1, tp_size=2), full[:, 3:])
    assert torch.equal(local_slice(full, Module.Q, tp_rank=1, tp_size=2), full[2:])
    assert torch.equal(local_slice(full[0], Module.Q_NORM, tp_rank=1, tp_size=2), full[0])


@pytest.mark.parametrize(
    ("module", "std", "message"),
    [
        (Module.K, None, r"init std of k \(layer 0\) is None; expected a positive"),
        (Module.UP, float("nan"), "is nan; expected a positive"),
        (Module.EMBEDDING, 0.0, r"init std of embedding .* is 0.0; expected a positive"),
        (Module.Q_NORM, 0.02, "is 0.02; expected None: gains start at 1"),
    ],
)
def test_a_bad_std_is_refused(module: Module, std: float | None, message: str) -> None:
    def broken(asked: Module, layer: int | None) -> float | None:
        return std if asked is module else init_std(asked, layer)

    with pytest.raises(HyperparamError, match=message):
        build_rank(std=broken)
