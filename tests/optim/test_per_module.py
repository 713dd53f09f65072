"""PerModuleAdamW on CPU against the algorithm box, against torch, and against itself reloaded."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
import torch

from megatron_completedp.errors import ClassificationError, CompletedPError, ConfigError
from megatron_completedp.optim.backend import StepInputs
from megatron_completedp.optim.flat import FlatAdamW
from megatron_completedp.optim.per_module import PerModuleAdamW, _backend
from megatron_completedp.optim.segments import AdamWValues, Segment, segments_of_shard
from tests.optim.transformer import TINY, Oracle, random_values, set_count, uneven_values

Segments = list[tuple[Segment, ...]]

STEPS = 100
#: Against float64. Float32 rounds each update by up to 2^-24 of the weight, and a slow weight
#: rounds the same way for many steps: a bound for one tensor, while most stay below TYPICAL.
WORST = STEPS * 2**-24
TYPICAL = 1e-6
#: Against the reference in float32, for every weight and moment: the two round alike but for fused
#: multiply-adds, whose differences go either way and stay within ten units in the last place.
SAME_ROUNDING = 1e-6


def tiny(seed: int = 0) -> tuple[list[torch.Tensor], Segments, list[AdamWValues]]:
    """Weights, segments and one set of values for each of 14 modules x layers."""
    torch.manual_seed(seed)
    tensors = TINY.tensors()
    segments = [of for _, of in tensors]
    params = [torch.randn(shape) for shape, _ in tensors]
    return params, segments, random_values(set_count(segments), seed)


def optimizer_of(
    params: list[torch.Tensor], segments: Segments, table: list[AdamWValues]
) -> PerModuleAdamW:
    optimizer = PerModuleAdamW(params)
    optimizer.assign(table, dict(zip(params, segments, strict=True)))
    return optimizer


def run(optimizer: PerModuleAdamW, steps: int, oracle: Oracle | None = None) -> None:
    """Steps with random gradients, a warm-up, and clipping in every third step."""
    params = optimizer.param_groups[0]["params"]
    for _ in range(steps):
        number = optimizer.param_groups[0].get("step", 0) + 1
        torch.manual_seed(number)
        grads = [1e-3 * torch.randn(param.shape) for param in params]
        inputs = StepInputs(
            step=number,
            lr_fraction=min(1.0, number / 8),
            grad_scale=0.25 if number % 3 == 0 else 1.0,
        )
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.param_groups[0]["lr"] = inputs.lr_fraction
        optimizer.grad_scale = inputs.grad_scale
        optimizer.step()
        if oracle:
            oracle.step(grads, inputs)


def rms(numbers: list[float]) -> float:
    return math.sqrt(sum(n * n for n in numbers) / len(numbers))


def test_every_module_of_every_layer_follows_the_algorithm_box() -> None:
    params, segments, table = tiny()
    assert len(table) == 14 + 11 * (TINY.layers - 1)
    oracle = Oracle(params, segments, table)
    optimizer = optimizer_of(params, segments, table)
    run(optimizer, STEPS, oracle)
    errors = oracle.errors(optimizer)
    assert max(errors) < WORST
    assert rms(errors) < TYPICAL


@pytest.mark.parametrize("seed", range(3))
def test_the_reference_in_float32_is_met_to_a_millionth(seed: int) -> None:
    params, segments, table = tiny(seed)
    table = uneven_values(len(table), seed)
    oracle = Oracle(params, segments, table, dtype=torch.float32)
    optimizer = optimizer_of(params, segments, table)
    run(optimizer, STEPS, oracle)
    assert max(oracle.errors(optimizer)) < SAME_ROUNDING


def _swap(segments: Segments, table: list[AdamWValues]) -> None:
    # q and k of the first layer's fused weight, the ranges easiest to exchange.
    qkv = segments[9]
    q, k = qkv[0].values, qkv[1].values
    table[q], table[k] = table[k], table[q]


def _wrong_eps(segments: Segments, table: list[AdamWValues]) -> None:
    table[4] = dataclasses.replace(table[4], eps=2 * table[4].eps)


def _skip(segments: Segments, table: list[AdamWValues]) -> None:
    # The length-1 gain of the first layer: the smallest thing that can be missed.
    table[segments[4][0].values] = dataclasses.replace(table[segments[4][0].values], lr=0.0)


@pytest.mark.parametrize("mistake", [_swap, _wrong_eps, _skip])
def test_the_comparison_catches(
    mistake: Callable[[Segments, list[AdamWValues]], None],
) -> None:
    params, segments, table = tiny()
    oracle = Oracle(params, segments, list(table))
    mistake(segments, table)
    optimizer = optimizer_of(params, segments, table)
    run(optimizer, 10, oracle)
    assert max(oracle.errors(optimizer)) > 10 * WORST


def test_shards_cut_anywhere_train_like_the_whole() -> None:
    params, segments, table = tiny()
    oracle = Oracle(params, segments, table)
    # Cuts of every tensor at thirds: through rows and row ranges; small tensors leave empty shards.
    shards, shard_segments = [], []
    for param, of in zip(params, segments, strict=True):
        flat, size = param.view(-1), param.numel()
        bounds = [0, size // 3, 2 * size // 3, size]
        for start, stop in pairwise(bounds):
            shards.append(flat[start:stop])
            shard_segments.append(segments_of_shard(of, 1, start, stop))
    assert any(not shard.numel() for shard in shards)
    optimizer = optimizer_of(shards, shard_segments, table)
    for number in range(1, 11):
        grads = [1e-3 * torch.randn(param.shape) for param in params]
        pieces = [
            grad.view(-1)[i * grad.numel() // 3 : (i + 1) * grad.numel() // 3].clone()
            for grad in grads
            for i in range(3)
        ]
        for shard, piece in zip(shards, pieces, strict=True):
            shard.grad = piece
        optimizer.step()
        oracle.step(grads, StepInputs(step=number, lr_fraction=1.0, grad_scale=1.0))
    for param, exact in zip(params, oracle.params, strict=True):
        # Ten steps of rounding, as WORST is a hundred.
        torch.testing.assert_close(param.view(-1).double(), exact, rtol=0, atol=10 * 2**-22)


@pytest.mark.parametrize("sets", ["one", "all equal"])
def test_equal_values_are_torch_adamw(sets: str) -> None:
    params, segments, _ = tiny()
    values = AdamWValues(lr=3e-3, weight_decay=0.1, eps=1e-8, beta1=0.9, beta2=0.95)
    table = [values] * set_count(segments)
    if sets == "one":
        segments = [(Segment(0, param.numel(), 0),) for param in params]
    theirs = [param.clone() for param in params]
    torchs = torch.optim.AdamW(
        theirs, lr=3e-3, weight_decay=0.1, eps=1e-8, betas=(0.9, 0.95), fused=True
    )
    ours = optimizer_of(params, segments, table)
    for _ in range(20):
        for mine, other in zip(params, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        ours.step()
        torchs.step()
    for mine, other in zip(params, theirs, strict=True):
        if sets == "one":
            assert torch.equal(mine, other)
        else:
            # Elsewhere cut, the kernel's vectors and their scalar rest lie elsewhere, and these
            # round differently: one unit in the last place for each of the 20 steps at most.
            torch.testing.assert_close(mine, other, rtol=20 * 2**-23, atol=20 * 2**-24)


@pytest.mark.parametrize("into", ["fresh", "same"])
def test_a_loaded_state_continues_bit_for_bit(into: str) -> None:
    params, segments, table = tiny()
    optimizer = optimizer_of(params, segments, table)
    run(optimizer, 5)
    saved = copy.deepcopy((optimizer.state_dict(), params))
    run(optimizer, 5)
    expected = copy.deepcopy(params)

    state, weights = saved
    assert set(state["state"][0]) == {"exp_avg", "exp_avg_sq"}
    assert state["param_groups"][0]["step"] == 5
    for param, weight in zip(params, weights, strict=True):
        param.copy_(weight)
    if into == "fresh":
        optimizer = optimizer_of(params, segments, table)
    # Into the same instance, the moments move to other memory than its cached views.
    optimizer.load_state_dict(state)
    run(optimizer, 5)
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


def test_values_of_a_checkpoint_change_nothing() -> None:
    params, segments, table = tiny()
    optimizer = optimizer_of(params, segments, table)
    run(optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0].update(weight_decay=7.0, betas=(0.5, 0.5), eps=1.0)
    twin_params = copy.deepcopy(params)
    twin = optimizer_of(twin_params, segments, table)
    twin.load_state_dict(state)
    run(optimizer, 3)
    run(twin, 3)
    assert all(torch.equal(a, b) for a, b in zip(params, twin_params, strict=True))


def kept_views(optimizer: PerModuleAdamW) -> list[torch.Tensor]:
    assert isinstance(optimizer._backend, FlatAdamW)
    fields = optimizer._backend._views
    return [view for field in fields for views in field.values() for view in views]


def storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_nothing_is_kept_but_the_state_and_the_gradients_until_zero_grad() -> None:
    params, segments, table = tiny()
    optimizer = optimizer_of(params, segments, table)
    run(optimizer, 2)
    moments = [moment for state in optimizer.state.values() for moment in state.values()]
    grads = [param.grad for param in params if param.grad is not None]
    known = storages([*params, *moments])
    views = kept_views(optimizer)
    assert len(views) == 4 * sum(map(len, segments))
    assert storages(views) == known | storages(grads)
    optimizer.zero_grad()
    views = kept_views(optimizer)
    assert len(views) == 3 * sum(map(len, segments))
    assert storages(views) == known


def test_gradients_that_move_are_followed() -> None:
    """Kept views of the last step's gradients must not be taken for this step's."""
    params, segments, table = tiny()
    twin_params = copy.deepcopy(params)
    optimizer, twin = (optimizer_of(of, segments, table) for of in (params, twin_params))
    for number in range(6):
        for param, other in zip(params, twin_params, strict=True):
            # One keeps its gradients' memory and the other never does.
            grad = torch.randn_like(param)
            param.grad = grad if param.grad is None else param.grad.copy_(grad)
            other.grad = grad.clone()
        if number == 3:
            optimizer.zero_grad(set_to_none=False)
            twin.zero_grad()
            for param, other in zip(params, twin_params, strict=True):
                other.grad = torch.zeros_like(other)
                assert param.grad is not None
        optimizer.step()
        twin.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twin_params, strict=True))


def test_grad_scale_holds_for_one_step_and_scales_grad() -> None:
    param = torch.ones(5)
    optimizer = optimizer_of([param], [(Segment(0, 5, 0),)], random_values(1))
    param.grad = torch.ones(5)
    optimizer.grad_scale = 0.25
    optimizer.step()
    assert optimizer.grad_scale == 1
    assert torch.equal(param.grad, torch.full((5,), 0.25))
    optimizer.step()
    assert torch.equal(param.grad, torch.full((5,), 0.25))


def test_an_empty_rank_counts_steps() -> None:
    optimizer = PerModuleAdamW([{"params": []}])
    optimizer.assign(random_values(1), {})
    optimizer.step()
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 2


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ({}, "segments end at 0 of 6"),
        ([Segment(0, 5, 0)], "segments end at 5 of 6"),
        ([Segment(0, 3, 0), Segment(4, 6, 0)], "where one from 3 up was due"),
        ([Segment(0, 4, 0), Segment(3, 6, 0)], "where one from 4 up was due"),
        ([Segment(0, 6, 1)], "values 1 of a table of 1"),
    ],
)
def test_segments_that_do_not_cover_are_refused(segments: list[Segment], message: str) -> None:
    param = torch.ones(2, 3)
    optimizer = PerModuleAdamW([param])
    with pytest.raises(ClassificationError, match=message):
        optimizer.assign(random_values(1), {param: segments} if segments else {})


def test_segments_of_another_tensor_are_refused() -> None:
    param = torch.ones(6)
    whole = [Segment(0, 6, 0)]
    with pytest.raises(ClassificationError, match="1 tensors that this optimizer does not hold"):
        PerModuleAdamW([param]).assign(random_values(1), {param: whole, torch.ones(6): whole})


def _before_assign(optimizer: PerModuleAdamW, param: torch.Tensor) -> None:
    PerModuleAdamW([param]).step()


def _replaced(optimizer: PerModuleAdamW, param: torch.Tensor) -> None:
    # As Megatron's distributed optimizer does when it is built around this one.
    optimizer.param_groups[0]["params"] = [param.clone()]
    optimizer.step()


def _no_gradient(optimizer: PerModuleAdamW, param: torch.Tensor) -> None:
    param.grad = None
    optimizer.step()


def _strided_gradient(optimizer: PerModuleAdamW, param: torch.Tensor) -> None:
    param.grad = torch.ones(3, 2).t()
    optimizer.step()


def _nan_scale(optimizer: PerModuleAdamW, param: torch.Tensor) -> None:
    optimizer.grad_scale = math.nan
    optimizer.step()


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (_before_assign, "before assign"),
        (_replaced, "were replaced after assign"),
        (_no_gradient, "no gradient"),
        (_strided_gradient, "not contiguous"),
        (_nan_scale, "grad_scale is nan"),
    ],
)
def test_a_step_that_cannot_be_right_is_refused(
    misuse: Callable[[PerModuleAdamW, torch.Tensor], None], message: str
) -> None:
    param = torch.ones(2, 3)
    param.grad = torch.ones(2, 3)
    optimizer = optimizer_of([param], [(Segment(0, 6, 0),)], random_values(1))
    with pytest.raises(CompletedPError, match=message):
        misuse(optimizer, param)
    assert "step" not in optimizer.param_groups[0]
    assert torch.equal(param, torch.ones(2, 3))


@pytest.mark.parametrize(
    "option", [{"capturable": True}, {"adam_w_mode": False}, {"bias_correction": False}]
)
def test_another_algorithm_is_refused(option: dict[str, bool]) -> None:
    with pytest.raises(ConfigError, match="decoupled weight decay and bias correction"):
        PerModuleAdamW([torch.ones(1)], **option)


def test_a_second_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="given 2 parameter groups"):
        PerModuleAdamW([{"params": [torch.ones(1)]}, {"params": [torch.ones(1)]}])


@pytest.mark.parametrize("param", [torch.ones(2, 3).bfloat16(), torch.ones(3, 2).t()])
def test_weights_of_another_kind_are_refused(param: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="expected contiguous float32"):
        optimizer_of([param], [(Segment(0, 6, 0),)], random_values(1))


def test_gradients_in_bfloat16_are_refused_on_cpu() -> None:
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.float32))
    optimizer = optimizer_of([param], [(Segment(0, 4, 0),)], random_values(1))
    param.grad_dtype = None
    param.grad = torch.ones(4, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"bfloat16; expected float32"):
        optimizer.step()


def test_a_torch_without_the_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_fused_adamw_")
    with pytest.raises(ConfigError, match=r"expected torch 2\.6 or newer"):
        FlatAdamW([])


def test_a_gpu_without_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules is how Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "megatron_completedp.optim.triton_adamw", None)
    with pytest.raises(ConfigError, match="needs triton"):
        _backend(torch.device("cuda"), [])
