"""Every parameter gets one module, or an error that says what to do."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from megatron_completedp.core.hyperparams import BaseHyperparams
from megatron_completedp.core.multipliers import Multipliers
from megatron_completedp.core.roles import Module
from megatron_completedp.core.tables import Rules
from megatron_completedp.errors import ClassificationError, ConfigError
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.torch_engine import (
    APERTUS,
    LLAMA,
    QWEN3,
    RoleMap,
    apply_multipliers,
    describe_groups,
    init_,
    param_groups,
)
from megatron_completedp.torch_engine.role_map import label_parameters
from tests.torch_engine.runs import batch, hf_model, loss_of, make_plan, parametrized


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan()


def labels(model: nn.Module, role_map: RoleMap, plan: Plan) -> list[tuple[str, Module, int | None]]:
    items = label_parameters(model, role_map, plan.config.model)
    return [(item.name, item.module, item.layer) for item in items]


@pytest.mark.parametrize(
    ("role_map", "model"), [(QWEN3, {}), (LLAMA, {}), (APERTUS, {"activation": "gelu"})]
)
def test_shipped_maps_hold_every_parameter_once(role_map: RoleMap, model: dict[str, Any]) -> None:
    plan = make_plan(model=model)
    built = parametrized(plan, role_map)
    groups = param_groups(built, role_map, plan)
    held = [parameter for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == set(built.parameters())
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in built.named_parameters())
    total = sum(parameter.numel() for parameter in held)
    assert f"{len(groups)} groups, {total:,} parameters" in describe_groups(built, role_map, plan)


def test_groups_hold_the_plans_values(plan: Plan) -> None:
    groups = param_groups(parametrized(plan), QWEN3, plan)
    by_name = {name: group for group in groups for name in group["param_names"]}
    for module, layer, name in (
        (Module.DOWN, 2, "model.layers.2.mlp.down_proj.weight"),
        (Module.K_NORM, 0, "model.layers.0.self_attn.k_norm.weight"),
        (Module.UNEMBEDDING, None, "lm_head.weight"),
    ):
        group, expected = by_name[name], plan.resolved.get(module, layer)
        found = (group["lr"], group["weight_decay"], group["eps"], *group["betas"])
        assert found == expected.optimizer_values


def test_layers_that_share_values_share_a_group() -> None:
    plan = make_plan(multipliers=Multipliers())
    groups = param_groups(parametrized(plan), QWEN3, plan)
    assert [group["name"] for group in groups] == [
        "embedding",
        "attention_norm mlp_norm [0-3]",
        "q k v gate up [0-3]",
        "q_norm k_norm [0-3]",
        "o down [0-3]",
        "final_norm",
        "unembedding",
    ]


def test_wrapped_models_keep_their_groups(plan: Plan) -> None:
    def names(model: nn.Module) -> list[list[str]]:
        return [group["param_names"] for group in param_groups(model, QWEN3, plan)]

    bare = names(parametrized(plan))
    wrapped = parametrized(plan)
    layer_class = type(wrapped.model.layers[0])
    apply_activation_checkpointing(wrapped, check_fn=lambda m: isinstance(m, layer_class))
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_parameters())
    assert names(wrapped) == bare
    compiled = torch.compile(parametrized(plan))
    assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
    assert names(compiled) == bare


def test_a_model_of_ones_own(plan: Plan) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = hf_model(plan.config.model)
            self.body, self.head = whole.model, whole.lm_head

    names = {
        module: name.replace("model.", "body.", 1).replace("lm_head", "head")
        for module, name in QWEN3.names.items()
    }
    own = labels(Own(), RoleMap("Own", names), plan)
    shipped = labels(hf_model(plan.config.model), QWEN3, plan)
    assert [place for _, *place in own] == [place for _, *place in shipped]


@pytest.mark.parametrize(
    ("role_map", "changes", "pieces"),
    [
        (QWEN3, {"attention_bias": True}, ["layers.0.self_attn.q_proj.bias", "biases"]),
        (QWEN3, {"num_hidden_layers": 5}, ["layers.4.", "the plan's model has 4 layers"]),
        (QWEN3, {"num_hidden_layers": 3}, ["no model.layers.3.", "has 4 layers"]),
        (QWEN3, {"intermediate_size": 128}, ["gate_proj", "(128, 96)", "(160, 96)", "ratios"]),
        (QWEN3, {"tie_word_embeddings": True}, ["embed_tokens", "lm_head", "two roles", "untie"]),
    ],
    ids=["bias", "deeper", "shallower", "narrower", "tied"],
)
def test_another_model_than_the_plans(
    role_map: RoleMap, changes: dict[str, Any], pieces: list[str], plan: Plan
) -> None:
    model = hf_model(plan.config.model, role_map, **changes)
    with pytest.raises(ClassificationError) as error:
        labels(model, role_map, plan)
    message = str(error.value).replace("tie_word_embeddings=False", "untie")
    assert all(piece in message for piece in pieces), message


def test_an_unmapped_parameter_is_named_with_the_nearest_name(plan: Plan) -> None:
    with pytest.raises(ClassificationError) as error:
        labels(hf_model(plan.config.model), LLAMA, plan)
    message = str(error.value)
    assert "model.layers.0.self_attn.q_norm.weight with shape (32,) has no module" in message
    assert "nearest name of the role map is model.layers.{layer}.self_attn.q_proj" in message


PHI = RoleMap("Phi3ForCausalLM", LLAMA.names)


def test_a_fused_tensor_without_a_name_is_called_fused(plan: Plan) -> None:
    model = hf_model(plan.config.model, PHI, pad_token_id=None)
    with pytest.raises(ClassificationError, match="fused into one tensor") as error:
        labels(model, PHI, plan)
    assert "qkv_proj" in str(error.value) or "gate_up_proj" in str(error.value)
    assert "Megatron engine" in str(error.value)


def test_a_fused_tensor_under_a_modules_name_is_called_fused(plan: Plan) -> None:
    names = {**LLAMA.names, Module.Q: "model.layers.{layer}.self_attn.qkv_proj.weight"}
    model = hf_model(plan.config.model, PHI, pad_token_id=None)
    with pytest.raises(ClassificationError, match=r"expected .* for q: .* q, k, v fused"):
        labels(model, RoleMap("Phi3ForCausalLM", names), plan)


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (Module.K, "model.layers.{layer}.self_attn.q_proj.weight", "q and k are both"),
        (Module.K, "model.k_proj.weight", "1 times {layer}"),
        (Module.FINAL_NORM, "model.layers.{layer}.norm.weight", "0 times {layer}"),
        (Module.O, "model.layers.{layer}.o_proj", "ends in .weight"),
    ],
)
def test_a_map_that_cannot_be_right(module: Module, name: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        RoleMap("Mine", {**QWEN3.names, module: name})
    assert message in str(error.value)


def test_a_map_without_a_module_of_the_plan(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="no name for gate"):
        labels(hf_model(plan.config.model), APERTUS, plan)


def test_tied_embeddings_where_the_rules_agree() -> None:
    plan = make_plan(
        rules=Rules(parametrization="completep"),
        model={"tied_embeddings": True},
        hyperparams=BaseHyperparams(lr=4e-3),
    )
    model = parametrized(plan)
    found = labels(model, QWEN3, plan)
    assert ("model.embed_tokens.weight", Module.EMBEDDING, None) in found
    assert Module.UNEMBEDDING not in {module for _, module, _ in found}
    assert model.lm_head._forward_hooks, "the logit multiplier belongs to the other end"
    assert not model.model.embed_tokens._forward_hooks
    untied = hf_model(plan.config.model, tie_word_embeddings=False)
    with pytest.raises(ClassificationError, match="lm_head"):
        labels(untied, QWEN3, plan)


def test_groups_without_multipliers_are_half_a_parametrization(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="half a parametrization"):
        param_groups(hf_model(plan.config.model), QWEN3, plan)
    other = make_plan(rules=Rules(depth_alpha=1.0))
    with pytest.raises(ConfigError, match=r"o_proj is multiplied by"):
        param_groups(parametrized(other), QWEN3, plan)


def test_multipliers_twice_are_refused(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="already has a multiplier"):
        apply_multipliers(parametrized(plan), QWEN3, plan)


def test_the_softmax_scale_of_a_model_without_qk_norm() -> None:
    """Folded into q by hand, which is exact for the loss of the first step."""
    plan = make_plan(model={"softmax_scale": 1 / 64})
    hooked, folded = parametrized(plan, LLAMA), parametrized(plan, LLAMA)
    for layer in folded.model.layers:
        layer.self_attn.q_proj._forward_hooks.clear()
        layer.self_attn.scaling = 1 / 64
    one, other = (loss_of(model, *batch(plan, 0)).item() for model in (hooked, folded))
    plain = loss_of(parametrized(make_plan(), LLAMA), *batch(plan, 0)).item()
    assert one == pytest.approx(other, rel=1e-6)
    assert abs(one - plain) > 1e-4


def test_weights_need_storage(plan: Plan) -> None:
    with torch.device("meta"):
        model = hf_model(plan.config.model)
    with pytest.raises(ConfigError, match="to_empty"):
        init_(model, QWEN3, plan)


def test_nothing_of_it_needs_megatron_deepspeed_or_transformers() -> None:
    program = (
        "import sys\n"
        "blocked = ('megatron', 'deepspeed', 'transformers')\n"
        "for name in blocked: sys.modules[name] = None\n"
        "import megatron_completedp.torch_engine\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
