"""Checkpoints to Hugging Face and back: equal logits, equal bits, bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from safetensors.torch import load_file

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.convert.export import Proof, to_hf
from megatron_completedp.convert.hf import hf_specs
from megatron_completedp.convert.hf_config import write_config
from megatron_completedp.convert.load import from_hf
from megatron_completedp.convert.mapping import MEGATRON_NAMES, ForwardMultipliers
from megatron_completedp.convert.safetensors_folder import plan_shards, write_shards
from megatron_completedp.core.hyperparams import BaseHyperparams
from megatron_completedp.core.roles import OUTSIDE_STACK, Module
from megatron_completedp.core.tables import Rules
from megatron_completedp.errors import CheckpointError
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.initial_weights import load_initial_weights
from megatron_completedp.mcore.parallel import initialize_parallel
from megatron_completedp.mcore.platform import detect_platform
from megatron_completedp.mcore.store import checkpoint_path
from megatron_completedp.mcore.weights import WeightReader
from megatron_completedp.plan.run_plan import Plan
from tests.mcore.conftest import Command
from tests.mcore.convert_runs import (
    PLAIN,
    STEPS,
    convert_config,
    export,
    large_shape,
    make_text,
    train,
)
from tests.mcore.engine_runs import batches, run_engine
from tests.mcore.train_runs import ROOT, losses, make_corpus, write_run

#: Logits of size 1, sums of fp32 in another order: some 1e-6. A wrong factor or row makes 1e-2.
LOGITS = 1e-5

CASES: dict[str, dict[str, Any]] = {
    "grouped_queries": {},
    "alpha_half": {"rules": Rules(depth_alpha=0.5)},
    "alpha_one": {"rules": Rules(depth_alpha=1.0)},
    "heads_of_64": {"model": {"num_query_groups": None, "head_dim": 64, "num_attention_heads": 2}},
    "logit_multiplier": {"rules": Rules(parametrization="completep", depth_alpha=0.75)},
    "softmax_scale": {"model": {"softmax_scale": 1 / 32}},
    "gelu": {"model": {"activation": "gelu"}},
    "tied": {
        "model": {"tied_embeddings": True},
        **PLAIN,
        "hyperparams": BaseHyperparams(lr=4e-3, hidden_init_std=0.1),
    },
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def plain_run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all multipliers at 1."""
    return train(convert_config(text, **PLAIN), tmp_path_factory.mktemp("runs") / "plain")


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_megatron(case: str, text: Path, tmp_path: Path) -> None:
    config = convert_config(text, **CASES[case])
    multipliers = Plan.of(config).resolved
    verification = export(train(config, tmp_path / "run"), text, tmp_path / "hf")
    assert verification.max_difference < LOGITS
    assert verification.largest_logit > 0.05, "nothing was compared"
    assert verification.tokenizer_agrees
    assert verification.greedy_agrees
    assert verification.perplexity_hf == pytest.approx(verification.perplexity_megatron, rel=1e-5)
    if case != "tied":
        factors = {value for r in multipliers.residual for value in (r.attention, r.mlp)}
        assert len(factors) > 4, "the folds would not be tested"
    assert multipliers.logit_multiplier == (0.5 if case == "logit_multiplier" else 1)


def test_plain_transformers_loads_and_generates(text: Path, tmp_path: Path) -> None:
    """In a process that never sees this package."""
    run = train(convert_config(text), tmp_path / "run")
    export(run, text, tmp_path / "hf", max_shard_bytes=200_000)
    program = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "folder = sys.argv[1]\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "ids = model.generate(**tokenizer('the model', return_tensors='pt'), max_new_tokens=5)\n"
        "print(type(model).__name__, ids.shape[1] > 4, 'megatron_completedp' in sys.modules)\n"
    )
    command = [sys.executable, "-I", "-W", "ignore", "-c", program, str(tmp_path / "hf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["Qwen3ForCausalLM", "True", "False"]


def test_shards_index_card_and_nothing_pickled(text: Path, tmp_path: Path) -> None:
    run = train(convert_config(text), tmp_path / "run")
    (run / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 1, "tokens": 384, "loss": 5.5}\n'
        '{"kind": "train", "step": 2, "tokens": 768, "loss": 5.25}\n'
        '{"kind": "eval", "step": 2, "loss": 5.375}\n{"kind": "tra'
    )
    out = tmp_path / "hf"
    export(run, text, out, max_shard_bytes=200_000)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    sizes = [sum(t.nbytes for t in load_file(s).values()) for s in shards]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert {path.suffix for path in out.iterdir()} == {
        ".safetensors", ".json", ".model", ".md", ".png",
    }  # fmt: skip
    card = (out / "README.md").read_text()
    for piece in ("parametrization: completedp", "5.2500", "5.3750", "verified", "residual"):
        assert piece in card, piece


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_there_and_back_is_bit_equal(precision: str, text: Path, tmp_path: Path) -> None:
    config = convert_config(text, **PLAIN, training={"precision": precision})
    run = train(config, tmp_path / "run")
    assert export(run, text, tmp_path / "hf").max_difference < LOGITS
    from_hf(tmp_path / "hf", tmp_path / "back", vocab_multiple=config.model.vocab_multiple)
    first, second = WeightReader(newest(run)), WeightReader(tmp_path / "back")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for name in megatron_names(config.model.num_layers):
        one, other = first.read(name), second.read(name)
        assert one.dtype == other.dtype == dtype
        assert one.shape == other.shape
        rows = config.model.vocab_size if "layers" not in name else len(one)
        assert torch.equal(one[:rows], other[:rows]), name
    to_hf_again = tmp_path / "hf_again"
    export(tmp_path / "back", text, to_hf_again, tokenizer_path=str(text / "tokenizer.model"))
    name = "model.safetensors"
    assert (to_hf_again / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_bf16_export_of_fp32_rounds_once(text: Path, tmp_path: Path) -> None:
    config = convert_config(text)
    run = train(config, tmp_path / "run")
    verification = export(run, text, tmp_path / "hf", dtype=torch.bfloat16)
    # Megatron's weights were rounded alike, or else the limit could be no sharper than rounding.
    assert verification.max_difference < LOGITS
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    reader = WeightReader(newest(run))
    whole = reader.read(MEGATRON_NAMES[Module.O].format(layer=1))
    fold = Plan.of(config).resolved.residual[1].attention
    found = weights["model.layers.1.self_attn.o_proj.weight"]
    assert torch.equal(found, (whole * fold).bfloat16())
    assert not torch.equal(found, whole.bfloat16() * fold), "rounded twice, it would be this"


def newest(run: Path) -> Path:
    return checkpoint_path(run / "checkpoints", STEPS)


def megatron_names(num_layers: int) -> list[str]:
    names = [
        name.format(layer=layer)
        for module, name in MEGATRON_NAMES.items()
        for layer in ([None] if module in OUTSIDE_STACK else range(num_layers))
    ]
    return list(dict.fromkeys(names))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_starts_from_the_weights(precision: str, text: Path, tmp_path: Path) -> None:
    """Masters too: a step from stale ones would bring the initial weights back."""
    config = convert_config(text, **PLAIN, training={"precision": precision})
    run = train(config, tmp_path / "run")

    def start(engine: Engine) -> None:
        held_out = batches(config, 1000)
        load_initial_weights(engine, run)  # its newest checkpoint
        before = [item.parameter.detach().clone() for item in engine.parameters]
        for step in range(2):  # the first, of the warm-up, has a learning rate of 0
            engine.train_step(batches(config, step))
        moved = [
            ((item.parameter - old).float().norm() / old.float().norm()).item()
            for item, old in zip(engine.parameters, before, strict=True)
        ]
        # The second step is small; the distance to other initial weights is not.
        assert 0 < max(moved) < 0.1
        assert engine.step == 2
        assert engine.evaluate(held_out) > 0

    run_engine(replace(config, seed=config.seed + 1), stop_at=0, inspect=start)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"ffn_hidden_size": 128}}, "ffn_hidden_size is 160 there, 128 here"),
        ({"model": {"rotary_base": 500}}, "rotary_base is 10000 there, 500 here"),
        ({"rules": Rules(depth_alpha=0.5)}, "trained with other residual or logit multipliers"),
    ],
)
def test_a_run_of_another_model_does_not_start(
    changes: dict[str, Any], message: str, plain_run: Path, text: Path
) -> None:
    def start(engine: Engine) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_initial_weights(engine, newest(plain_run))

    run_engine(convert_config(text, **{**PLAIN, **changes}), stop_at=0, inspect=start)


def test_training_starts_from_hugging_face(
    command: Command, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """The whole way by the training command: train, export, load, train on."""
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"))
    first = write_run(tmp_path / "first", corpus, parametrization="sp")
    assert command(first) == (0, "")
    initialize_parallel(detect_platform("cpu"), ParallelConfig(), timeout_s=60, seed=1)
    to_hf(tmp_path / "first", tmp_path / "hf", proof=Proof(samples=2))
    from_hf(tmp_path / "hf", tmp_path / "back")
    back = {"training__start_from": str(tmp_path / "back"), "parametrization": "sp"}
    second = write_run(tmp_path / "second", corpus, **back)
    assert command(second) == (0, "")
    ended, started = losses(tmp_path / "first"), losses(tmp_path / "second")
    assert started[0][1] < ended[0][1] - 0.5, "it starts where the first run stopped"
    again = write_run(tmp_path / "third", corpus, training__start_from=str(tmp_path / "none"))
    code, message = command(again)
    assert (code, "holds no checkpoint; expected the folder of a run" in message) == (1, True)


def test_memory_is_that_of_one_file(tmp_path: Path) -> None:
    """In a process of its own: files of 6 MB, of a model of 75 MB."""
    shape = large_shape()
    ones = ForwardMultipliers.ones(shape.num_layers)
    (tmp_path / "hf").mkdir()
    write_config(tmp_path / "hf", shape, dtype=torch.float32, eod=0)
    specs = hf_specs(shape, ones, torch.float32)
    shards = plan_shards(specs, 20_000_000)
    write_shards(tmp_path / "hf", shards, (torch.ones(spec.shape) for spec in specs))
    from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    out = tmp_path / "out"
    out.mkdir()
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.mcore.convert_runs import streamed_export\n"
        "streamed_export(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, tmp_path / "checkpoint", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["files"] >= 10
    # Allocators and buffers of the process are below 8 MB; the whole model would be 75 MB.
    assert figures["grown"] < 2 * figures["largest_file"] + 8e6, figures
