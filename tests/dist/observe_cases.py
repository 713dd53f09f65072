"""The checks' measurements under each layout; run by `harness`, compared in test_observe.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from megatron_completedp.check.measure import Bench, Key, Ladder
from megatron_completedp.check.probe import Record, observable, probe, probe_optimizer, processes
from megatron_completedp.check.sizes import small_base
from megatron_completedp.check.tokens import Batches, synthetic_sequence
from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.study.sizes import moved

STEPS = (0, 1, 2)


def one() -> list[Record]:
    """No parallelism but data parallelism, which is what the world size leaves over."""
    return _measure(ParallelConfig())


def tp2() -> list[Record]:
    """Two ranks share each matrix."""
    return _measure(ParallelConfig(tensor_model_parallel_size=2))


def pp2() -> list[Record]:
    """Two ranks share the layers."""
    return _measure(ParallelConfig(pipeline_model_parallel_size=2))


def tp2_pp2() -> list[Record]:
    """Four ranks do both."""
    return _measure(ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2))


def built_in() -> dict[Key, float]:
    """The base that comes with the checks, whose one micro batch no two ranks can share."""
    with Bench(small_base(), None, steps=(0, 1)) as bench:
        return dict(bench.series(Ladder(axis="width", ratios=(1, 2), seeds=(1,)), 2, 1))


def _measure(layout: ParallelConfig) -> list[Record]:
    """A base twice as deep, in micro batches small enough for two data-parallel ranks."""
    base = small_base()
    base = replace(base, parallel=layout, training=replace(base.training, micro_batch_size=2))
    config = observable(moved(base, "depth", 2))
    batches = Batches(config, partial(synthetic_sequence, config))
    with processes(config) as where:
        return probe(config, where, batches, steps=STEPS) + probe_optimizer(config, where, batches)
