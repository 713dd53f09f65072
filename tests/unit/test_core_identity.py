"""Which numbers may differ between a checkpoint and the run that takes it up."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from config_samples import small_tree

from megatron_completedp.config.load import build
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.identity import (
    MODULE_FIELDS,
    Change,
    changes,
    check_changes,
    check_names,
    describe,
)
from megatron_completedp.core.roles import Module
from megatron_completedp.errors import CheckpointError, ConfigError
from megatron_completedp.plan.run_plan import Plan


def table(**settings: Any) -> dict[str, Any]:
    """As a checkpoint has it: through JSON."""
    resolved = Plan.of(build(RunConfig, small_tree(**settings))).resolved
    found: dict[str, Any] = json.loads(json.dumps(resolved.as_json()))
    return found


def test_the_same_run_has_no_changes() -> None:
    assert changes(table(), table()) == []
    assert check_changes(table(), table(), ()) == []


@pytest.mark.parametrize("field", MODULE_FIELDS)
@pytest.mark.parametrize("module", ["q", "embedding"])
def test_one_number_by_its_last_bit(module: str, field: str) -> None:
    now = table()
    entry = next(entry for entry in now["modules"] if entry["module"] == module)
    saved = entry[field]
    entry[field] = saved * (1 + 2**-52)
    assert changes(table(), now) == [Change(module, entry["layer"], field, saved, entry[field])]
    with pytest.raises(CheckpointError, match=rf"--allow-hp-change {module}\.{field}"):
        check_changes(table(), now, [f"v.{field}", f"{module}.init_std"])
    assert len(check_changes(table(), now, [f"{module}.{field}"])) == 1
    assert len(check_changes(table(), now, [f"*.{field}"])) == 1


def test_multipliers_of_the_forward_pass_count_and_init_does_not() -> None:
    now = copy.deepcopy(table())
    now["residual"][2]["mlp"] *= 2
    now["logit_multiplier"] *= 2
    now["modules"][0]["init_std"] *= 2
    found = changes(table(), now)
    assert [(c.module, c.layer, c.field) for c in found] == [
        ("residual", 2, "mlp"),
        ("logit", None, "multiplier"),
    ]
    assert len(check_changes(table(), now, check_names(["residual.mlp", "*.multiplier"]))) == 2


def test_the_refusal_is_a_table_of_what_was_not_named() -> None:
    now = table(**{"multipliers.types": {"q": {"lr_mult": 2.0, "eps_mult": 3.0}}})
    with pytest.raises(CheckpointError) as caught:
        check_changes(table(), now, ["q.eps"])
    message = str(caught.value)
    assert message.endswith("--allow-hp-change q.lr")
    assert "eps" not in message
    header, row = message.splitlines()[1:3]
    assert header.split() == ["module", "layers", "field", "saved", "now"]
    module, layers, field, saved, now_value = row.split()
    assert (module, layers, field) == ("q", "0-3", "lr")
    assert float(now_value) == pytest.approx(2 * float(saved), rel=1e-15)
    assert describe([Change("logit", None, "multiplier", 1.0, 2.0)]).splitlines()[1].split() == [
        "logit",
        "-",
        "multiplier",
        "1.0",
        "2.0",
    ]


def test_another_model_is_not_a_change() -> None:
    with pytest.raises(CheckpointError, match="of another model: only one of the two has"):
        changes(table(), table(**{"model.num_layers": 2}))


def test_names() -> None:
    every = [f"{module}.{field}" for module in Module for field in MODULE_FIELDS]
    assert check_names([*every, "*.lr", "residual.attention", "logit.multiplier"]) >= set(every)
    assert check_names([]) == frozenset()
    for wrong in ("q", "q.lrr", "qq.lr", "q.init_std", "*", ""):
        with pytest.raises(ConfigError, match=r"expected module\.field, such as "):
            check_names([wrong])
    with pytest.raises(ConfigError, match=r"such as .*q\.lr"):
        check_names(["q.lrr"])
