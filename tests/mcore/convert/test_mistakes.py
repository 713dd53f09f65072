"""Wrong exports, which `verify` must not let pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")


from megatron_completedp.convert import export as export_module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ConversionError
from megatron_completedp.plan.run_plan import Plan
from tests.mcore.convert.samples import LAYER, Weights, check, edit, swap
from tests.mcore.convert_runs import export


def interleave(weights: Weights, name: str, head_dim: int) -> None:
    """Heads in the order of a layout with the group as the inner dimension."""
    heads = weights[LAYER + name].unflatten(0, (2, -1, head_dim))
    weights[LAYER + name] = heads.transpose(0, 1).flatten(0, 2)


def scale(weights: Weights, name: str, factor: float) -> None:
    weights[name] = weights[name] * factor


#: Each is one slip of a converter; q and k differ in size, so they are swapped head by head.
MISTAKES: dict[str, Callable[[Weights, Any], object]] = {
    "gate and up swapped": lambda w, c: swap(w, "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "k and v swapped": lambda w, c: swap(w, "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "q and k swapped": lambda w, c: swap_q_and_k(w, c.model),
    "q and k norms swapped": lambda w, c: swap(
        w, "self_attn.q_norm.weight", "self_attn.k_norm.weight"
    ),
    "heads interleaved wrongly": lambda w, c: interleave(
        w, "self_attn.q_proj.weight", c.model.head_dim
    ),
    "o not folded in one layer": lambda w, c: scale(
        w, LAYER + "self_attn.o_proj.weight", 1 / residual(c, 2).attention
    ),
    "down not folded in one layer": lambda w, c: scale(
        w, LAYER + "mlp.down_proj.weight", 1 / residual(c, 2).mlp
    ),
    "softmax scale not folded": lambda w, c: scale(
        w, LAYER + "self_attn.q_norm.weight", 20 / c.model.head_dim**0.5
    ),
    "logit multiplier not folded": lambda w, c: scale(
        w, "lm_head.weight", 1 / Plan.of(c).resolved.logit_multiplier
    ),
    "one row of the vocabulary off": lambda w, c: w.update(
        {"lm_head.weight": w["lm_head.weight"].roll(1, 0)}
    ),
    # Small ones, that rounding to bf16 would hide.
    "a q norm a fifth too large": lambda w, c: scale(w, LAYER + "self_attn.q_norm.weight", 1.2),
    "an o a tenth too large": lambda w, c: scale(w, LAYER + "self_attn.o_proj.weight", 1.1),
    "logits a fiftieth too large": lambda w, c: scale(w, "lm_head.weight", 1.02),
    "a NaN": lambda w, c: w["model.norm.weight"].fill_(float("nan")),
}


def residual(config: Any, layer: int) -> Any:
    return Plan.of(config).resolved.residual[layer]


def swap_q_and_k(weights: Weights, shape: ModelShape) -> None:
    q, k = (LAYER + f"self_attn.{name}_proj.weight" for name in "qk")
    rows = shape.head_dim  # the first head of each
    first = weights[q][:rows].clone()
    weights[q][:rows], weights[k][:rows] = weights[k][:rows].clone(), first


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_copy_passes(
    dtype: str, run: Path, good: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(good[dtype], tmp_path / "copy"))
    edit(copy, lambda weights: None)
    assert check(run, copy, text).problems == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_verify_catches_a_mistake(
    mistake: str,
    dtype: str,
    run: Path,
    good: dict[str, Path],
    text: Path,
    config: Any,
    tmp_path: Path,
) -> None:
    copy = Path(shutil.copytree(good[dtype], tmp_path / "copy"))
    edit(copy, lambda weights: MISTAKES[mistake](weights, config))
    found = check(run, copy, text)
    assert any("logits differ" in problem for problem in found.problems), found


@pytest.mark.parametrize(
    ("key", "value"),
    [("rms_norm_eps", 1e-2), ("hidden_act", "gelu"), ("rope_parameters", {"rope_theta": 9e3})],
)
def test_verify_catches_a_wrong_config(
    key: str, value: object, run: Path, copy: Path, text: Path
) -> None:
    path = copy / "config.json"
    config = json.loads(path.read_text())
    if isinstance(value, dict):
        value = {**config[key], **value}
    path.write_text(json.dumps({**config, key: value}))
    assert check(run, copy, text).problems


def test_verify_catches_another_tokenizer(run: Path, copy: Path, text: Path) -> None:
    path = copy / "tokenizer.json"
    tree = json.loads(path.read_text())
    merges = tree["model"]["merges"]
    tree["model"]["merges"] = merges[len(merges) // 2 :]
    path.write_text(json.dumps(tree))
    assert check(run, copy, text).problems == ["the tokenizers give different ids"]


def test_a_wrong_export_is_never_published(
    run: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit code of to-hf is 1, and there is no folder."""
    write = export_module.write_hf_weights

    def wrong(folder: Path, *args: Any, **options: Any) -> None:
        write(folder, *args, **options)
        edit(folder, lambda w: swap(w, "mlp.gate_proj.weight", "mlp.up_proj.weight"))

    monkeypatch.setattr(export_module, "write_hf_weights", wrong)
    with pytest.raises(ConversionError, match=r"(?s)is not the one in .*was not written"):
        export(run, text, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []
