"""Checkpoints of every layout, converted by one process; run by `harness`, see test_convert.py."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.config.run import RunConfig
from megatron_completedp.convert.load import from_hf
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.initial_weights import load_initial_weights
from megatron_completedp.mcore.parallel import destroy_parallel, initialize_parallel
from megatron_completedp.mcore.platform import CpuPlatform
from tests.dist.engine_cases import LAYOUTS
from tests.mcore.convert_runs import PLAIN, STEPS, convert_config, export, make_text, train
from tests.mcore.engine_runs import batches, run_engine


def __getattr__(name: str) -> Any:
    """Cases are named `KIND_LAYOUT`: `train` and `start` run in the layout, `convert` in one."""
    kind, _, layout = name.partition("_")
    cases = {"train": _train, "convert": _convert, "start": _start}
    if kind in cases:
        return lambda: cases[kind](layout)
    raise AttributeError(name)


def folder(name: str) -> Path:
    return Path(os.environ["COMPLETEDP_TEST_FOLDER"]) / name


def text() -> None:
    """Once, before all others."""
    make_text(folder("text"))


def _train(layout: str) -> str:
    config = convert_config(folder("text"), ParallelConfig(**LAYOUTS[layout]))
    return str(train(config, folder(layout)))


def _convert(layout: str) -> dict[str, Any]:
    """Export and verify, in one process that knows nothing of the layout."""
    initialize_parallel(CpuPlatform(), ParallelConfig(), timeout_s=120, seed=1)
    try:
        return export(folder(layout), folder("text"), folder(f"hf_{layout}")).as_json()
    finally:
        destroy_parallel(keep_process_group=True)


def plain_config(parallel: ParallelConfig) -> RunConfig:
    """Multipliers of 1 and no padded vocabulary, whose rows a Hugging Face model would not have."""
    config = convert_config(folder("text"), parallel, **PLAIN)
    return replace(config, model=replace(config.model, vocab_multiple=2))


def plain() -> float:
    """Train, export and load back; the loss of the trained weights on held-out batches."""
    config = plain_config(ParallelConfig())
    trace = run_engine(config, stop_at=STEPS, save_to=folder("plain") / "checkpoints")[0]
    initialize_parallel(CpuPlatform(), ParallelConfig(), timeout_s=120, seed=1)
    try:
        export(folder("plain"), folder("text"), folder("hf_plain"))
        from_hf(folder("hf_plain"), folder("back"), vocab_multiple=2)
    finally:
        destroy_parallel(keep_process_group=True)
    return trace.evaluation


def _start(layout: str) -> dict[str, float]:
    """The loss before and after the weights of `plain` are put in, and after steps from them."""
    config = plain_config(ParallelConfig(**LAYOUTS[layout]))

    def start(engine: Engine) -> dict[str, float]:
        ranks = {
            "dp_rank": parallel_state.get_data_parallel_rank(),
            "dp_size": parallel_state.get_data_parallel_world_size(),
        }
        held_out = batches(config, 1000, **ranks)
        fresh = engine.evaluate(held_out)
        load_initial_weights(engine, folder("back"))
        started = engine.evaluate(held_out)
        for step in range(2):  # the first, of the warm-up, has a learning rate of 0
            engine.train_step(batches(config, step, **ranks))
        return {"fresh": fresh, "started": started, "trained": engine.evaluate(held_out)}

    found: dict[str, float] = run_engine(config, stop_at=0, inspect=start)[1]
    return found
