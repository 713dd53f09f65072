"""Strict YAML: what is accepted, what is refused with which message, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from config_samples import small_tree
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_completedp.config.load import (
    NOT_THE_RUN,
    build,
    config_hash,
    identity,
    load_config,
    read_yaml,
    to_tree,
    to_yaml,
)
from megatron_completedp.config.run import RunConfig
from megatron_completedp.config.schema import leaf_paths
from megatron_completedp.core.roles import Module
from megatron_completedp.errors import CompletedPError, ConfigError


def make(**changes: Any) -> RunConfig:
    return build(RunConfig, small_tree(**changes))


def from_text(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


def test_file_loads_with_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(small_tree()), encoding="utf-8")
    config = load_config(path)
    assert config == make()
    assert config.rules.parametrization == "completedp"
    assert config.model.num_layers == 4
    assert config.training.clip_grad == 1.0
    assert config.parallel.pipeline_model_parallel_size == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-3", 0.003), ("3.0e-3", 0.003), ("1", 1.0), ('"3e-3"', 0.003), ("1_0.5", 10.5)],
)
def test_floats_as_written_by_people(tmp_path: Path, text: str, value: float) -> None:
    """PyYAML reads 3e-3, which has no dot, as a string; a config means the number."""
    config = make(**{"hyperparams.lr": from_text(tmp_path, f"lr: {text}")["lr"]})
    assert config.hyperparams.lr == value
    assert type(config.hyperparams.lr) is float


@pytest.mark.parametrize("text", ["12800", "12_800", "1.28e4", "1.28e+4", "12800.0", '"12800"'])
def test_whole_numbers_as_written_by_people(tmp_path: Path, text: str) -> None:
    config = make(**{"training.train_tokens": from_text(tmp_path, f"n: {text}")["n"]})
    assert config.training.train_tokens == 12800
    assert type(config.training.train_tokens) is int


def test_large_whole_numbers_stay_exact() -> None:
    """2^53 + 1 has no float64; a detour over float would lose the 1."""
    assert make(seed=2**53 + 1).seed == 2**53 + 1
    assert make(seed=str(2**53 + 1)).seed == 2**53 + 1


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("model.num_layers", 4.5, "4.5 (float); expected a whole number"),
        ("model.num_layers", "four", "'four' (str); expected a whole number"),
        ("model.num_layers", True, "True (bool); expected a whole number"),
        ("model.num_layers", None, "null; expected a whole number"),
        ("hyperparams.lr", [0.1], "[0.1] (list); expected a finite number"),
        ("hyperparams.lr", "nan", "'nan' (str); expected a finite number"),
        ("hyperparams.lr", float("inf"), "inf (float); expected a finite number"),
        ("hyperparams.lr", "1e999", "'1e999' (str); expected a finite number"),
        ("parallel.sequence_parallel", "yes", "'yes' (str); expected true or false"),
        ("parallel.sequence_parallel", 1, "1 (int); expected true or false"),
        ("run_dir", 7, "7 (int); expected text"),
        ("data.train", "corpus", "'corpus' (str); expected a list"),
        ("schedule.kind", "step", "'step' (str); expected one of cosine, linear, wsd, constant"),
        ("parametrization", "mP", "'mP' (str); expected one of sp, mup, completep, completedp"),
        ("multipliers.types", [], "[] (list); expected a mapping"),
        ("model", 3, "3 (int); expected a section"),
        ("schedule", None, "null; expected a section"),
    ],
)
def test_wrong_type_names_path_value_and_expectation(path: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(**{path: value})
    assert str(error.value).startswith(f"{path} is {expected}")


def test_wrong_type_inside_a_list_names_the_position() -> None:
    with pytest.raises(ConfigError, match=r"multipliers\.depth\.lr_mult\[1\] is 'x'"):
        make(**{"multipliers.depth.lr_mult": [1, "x"]})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.num_layer", "unknown key model.num_layer; did you mean model.num_layers"),
        ("depht_alpha", "unknown key depht_alpha; did you mean depth_alpha?"),
        # Right name, wrong section.
        ("lr", "unknown key lr; did you mean hyperparams.lr?"),
        ("rules", "unknown key rules; expected one of run_dir, seed, recipe, parametr"),
        ("model.zzz", "unknown key model.zzz; expected one of num_layers, hidden_size"),
        ("multipliers.types.quey", "unknown key multipliers.types.quey; expected one of embedding"),
        ("multipliers.types.q.lr_mul", "did you mean multipliers.types.q.lr_mult?"),
        ("multipliers.types.k_nrom", "did you mean multipliers.types.k_norm"),
    ],
)
def test_unknown_key_names_the_nearest(path: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(**{path: 1})
    assert message in str(error.value)


def test_unknown_key_that_is_not_text() -> None:
    with pytest.raises(ConfigError, match="unknown key 3;"):
        build(RunConfig, {3: 1})


@pytest.mark.parametrize(
    ("section", "key", "named"),
    [
        ("", "run_dir", "run_dir"),
        ("hyperparams", "lr", "hyperparams.lr (Peak learning rate)"),
        ("training", "global_batch_size", "training.global_batch_size"),
        ("base", "num_layers", "base.num_layers"),
    ],
)
def test_missing_field_is_named(section: str, key: str, named: str) -> None:
    tree = small_tree()
    del (tree[section] if section else tree)[key]
    with pytest.raises(ConfigError) as error:
        build(RunConfig, tree)
    assert str(error.value).startswith(f"missing: {named}")


def test_missing_section_names_its_required_fields() -> None:
    tree = small_tree()
    del tree["model"]
    with pytest.raises(ConfigError, match=r"missing: model\.num_layers .*model\.seq_length"):
        build(RunConfig, tree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "line 2: 'seed' is given twice"),
        ("model:\n  hidden_size: 1\n  hidden_size: 2\n", "line 3: 'hidden_size' is given twice"),
        ("a: &a {seed: 1}\nb:\n  <<: *a\n", "line 3: merge keys"),
        ("- 1\n", "expected a mapping of sections"),
        ("a: [1\n", "is not valid YAML"),
        ("run: {{ run }}\n", "is not valid YAML"),
        ("? [a, b]\n: 1\n? [a, b]\n: 2\n", "is not valid YAML"),
        ("a: !!python/object:os.system {}\n", "is not valid YAML"),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_text(tmp_path, text)
    assert message in str(error.value)
    assert "run.yaml" in str(error.value)


def test_same_key_in_two_sections_is_no_duplicate(tmp_path: Path) -> None:
    text = "evaluation: {interval: 1}\nlogging: {interval: 2}\n"
    assert from_text(tmp_path, text)["logging"] == {"interval": 2}


def test_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config(tmp_path / "absent.yaml")


def test_multipliers_by_module() -> None:
    config = make(
        **{"multipliers.types": {"q": {"lr_mult": 2}}, "multipliers.depth.eps_mult": [0.5, "2e0"]}
    )
    assert config.multipliers.of(Module.Q).lr_mult == 2.0
    assert config.multipliers.of(Module.K).lr_mult == 1.0
    assert config.multipliers.depth.eps_mult == (0.5, 2.0)


FULL = {
    "depth_alpha": 0.5,
    "multipliers.types": {"q": {"lr_mult": 2}, "o": {"init_std_mult": 0.5}},
    "multipliers.depth.lr_mult": [0.5, 2],
    "data.train": ["a/b", "123"],
    "data.train_weights": [1, 3],
    "parallel.tensor_model_parallel_size": 2,
    "parallel.sequence_parallel": True,
    "model.softmax_scale": 0.125,
}


@pytest.mark.parametrize("changes", [{}, {"base": None}, FULL])
def test_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = make(**changes)
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert config_hash(load_config(path)) == config_hash(config)


@settings(max_examples=20, deadline=None)
@given(st.floats(min_value=5e-324, max_value=1e308), st.text("1e.-_:#&*'\" \nxo"))
def test_round_trip_keeps_every_bit(lr: float, run_dir: str) -> None:
    """YAML writes a float by its repr, which is exact; and text that looks like a number quoted."""
    config = make(**{"hyperparams.lr": lr, "run_dir": run_dir})
    again = build(RunConfig, yaml.safe_load(to_yaml(config)))
    assert again == config


def test_resolved_yaml_writes_every_value() -> None:
    """A later change of a default must not change what an old run's file says."""
    tree = to_tree(make())
    for path in leaf_paths(RunConfig):
        node: Any = tree
        if path.startswith("base."):
            continue
        for part in path.split("."):
            node = node[part]


def test_hash_is_of_the_run_and_not_of_the_spelling() -> None:
    assert config_hash(make(**{"hyperparams.lr": "1e-2"})) == config_hash(make())
    assert config_hash(make(**{"hyperparams.weight_decay": 0.1})) == config_hash(make())


def test_identity_has_no_defaults_and_nothing_of_where_and_how_often() -> None:
    """A field added later, which is at its default in old runs, must leave them as they are."""
    found = identity(make(**{"training.z_loss": 1e-4, "training.clip_grad": 2.0}), "model")
    assert found["training"] == {"global_batch_size": 8, "train_tokens": 12800, "clip_grad": 2.0}
    assert found.keys() == {"base", "hyperparams", "training"}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run_dir", "elsewhere"),
        ("logging.interval", 3),
        ("checkpoint.keep_last", 9),
        ("evaluation.interval", 7),
        ("parallel.pipeline_model_parallel_size", 2),
        ("training.micro_batch_size", 4),
        ("training.device", "cpu"),
        ("training.timeout_s", 60.0),
        ("divergence.on_nonfinite", "rollback"),
        ("data.cache_dir", "/cache"),
    ],
)
def test_hash_ignores_where_and_how_often(path: str, value: Any) -> None:
    assert config_hash(make(**{path: value})) == config_hash(make())
    assert any(path == name or path.startswith(f"{name}.") for name in NOT_THE_RUN)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1),
        ("parametrization", "sp"),
        ("base.batch_tokens", 128),
        ("hyperparams.lr", 0.02),
        ("multipliers.types", {"q": {"lr_mult": 2}}),
        ("model.vocab_size", 501),
        ("schedule.kind", "wsd"),
        ("training.clip_grad", 0.5),
        ("training.precision", "bf16"),
        ("data.train", ["a"]),
    ],
)
def test_hash_changes_with_the_run(path: str, value: Any) -> None:
    assert config_hash(make(**{path: value})) != config_hash(make())


def test_errors_carry_the_usage_exit_code() -> None:
    with pytest.raises(CompletedPError) as error:
        make(zzz=1)
    assert error.value.exit_code == 2
