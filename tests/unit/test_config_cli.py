"""Flags over YAML over defaults, merged before anything is checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_samples import small_tree

from megatron_completedp.config.cli import MEGATRON_FLAGS, load_run, run_command
from megatron_completedp.config.run import RunConfig
from megatron_completedp.config.schema import leaf_paths
from megatron_completedp.config.tree import merge
from megatron_completedp.errors import ConfigError, DataError


@dataclass(frozen=True)
class Extra:
    """Flags of an imagined command."""

    dry_run: bool = False
    """Only look."""


def load(tmp_path: Path, *flags: str, tree: dict[str, Any] | None = None) -> RunConfig:
    return load_both(tmp_path, *flags, tree=tree)[0]


def load_both(
    tmp_path: Path, *flags: str, tree: dict[str, Any] | None = None
) -> tuple[RunConfig, Extra]:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(small_tree() if tree is None else tree), encoding="utf-8")
    argv = ["--config", str(path), *flags]
    return load_run(argv, prog="test", description="A test.", extra=Extra)


def test_flags_beat_yaml_and_yaml_beats_defaults(tmp_path: Path) -> None:
    tree = small_tree(**{"logging.interval": 3, "checkpoint.interval": 5})
    config = load(tmp_path, "--logging.interval", "4", tree=tree)
    assert config.logging.interval == 4  # flag over YAML (3) and default (10)
    assert config.checkpoint.interval == 5  # YAML over default (1000)
    assert config.checkpoint.keep_last == 2  # default


def test_without_flags_the_yaml_stands(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.parallel.sequence_parallel is False
    assert config.base is not None


@pytest.mark.parametrize(
    ("flags", "section", "field", "value"),
    [
        (["--num-layers", "6"], "model", "num_layers", 6),
        (["--model.num-layers", "6"], "model", "num_layers", 6),
        (["--vocab-size", "1_000"], "model", "vocab_size", 1000),
        (["--num-query-groups", "4"], "model", "num_query_groups", 4),
        (["--lr", "3e-3"], "hyperparams", "lr", 0.003),
        (["--training.train-tokens", "2.56e4"], "training", "train_tokens", 25600),
        (["--micro-batch-size", "2"], "training", "micro_batch_size", 2),
        (["--use-distributed-optimizer"], "parallel", "use_distributed_optimizer", True),
        (["--checkpoint.no-save-at-end"], "checkpoint", "save_at_end", False),
        (["--data.train", "a", "b"], "data", "train", ("a", "b")),
        (["--schedule.decay-fraction", "0.5"], "schedule", "decay_fraction", 0.5),
        (["--multipliers.mlp-residual-mult", "2"], "multipliers", "mlp_residual_mult", 2.0),
    ],
)
def test_flags_and_megatron_aliases(
    tmp_path: Path, flags: list[str], section: str, field: str, value: Any
) -> None:
    assert getattr(getattr(load(tmp_path, *flags), section), field) == value


def test_top_level_and_rule_flags(tmp_path: Path) -> None:
    config = load(tmp_path, "--parametrization", "mup", "--depth-alpha", "0.5", "--seed", "7")
    assert (config.rules.parametrization, config.rules.depth_alpha, config.seed) == ("mup", 0.5, 7)


def test_train_iters_replaces_tokens(tmp_path: Path) -> None:
    config = load(tmp_path, "--train-iters", "7", "--training.train-tokens", "None")
    assert config.steps == 7


def test_yaml_that_is_valid_only_with_a_flag(tmp_path: Path) -> None:
    """Checked after merging: heads that TP does not divide, until the flag brings more heads."""
    tree = small_tree(**{"parallel.tensor_model_parallel_size": 16, "base": None})
    with pytest.raises(ConfigError, match="num_attention_heads is 8"):
        load(tmp_path, tree=tree)
    config = load(tmp_path, "--num-attention-heads", "16", tree=tree)
    assert config.parallel.tensor_model_parallel_size == 16


def test_required_field_may_come_from_a_flag(tmp_path: Path) -> None:
    tree = small_tree()
    del tree["hyperparams"]
    with pytest.raises(ConfigError, match=r"missing: hyperparams\.lr"):
        load(tmp_path, tree=tree)
    assert load(tmp_path, "--lr", "0.5", tree=tree).hyperparams.lr == 0.5


def test_no_yaml_at_all() -> None:
    with pytest.raises(
        ConfigError, match=r"missing: run_dir .*hyperparams\.lr .*model\.num_layers"
    ):
        load_run([], prog="test", description="A test.", extra=Extra)


def test_base_flags_only_where_there_is_a_base(tmp_path: Path) -> None:
    """A base flag changes one value of the YAML's base; unset flags must not invent a base."""
    assert load(tmp_path, tree=small_tree(base=None)).base is None
    config = load(tmp_path, "--base.batch-tokens", "128")
    assert config.base is not None
    assert (config.base.batch_tokens, config.base.num_layers) == (128, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "fast"], "hyperparams.lr is 'fast'"),
        (["--num-layers", "2.5"], "model.num_layers is '2.5'"),
        (["--tensor-model-parallel-size", "3"], "num_attention_heads is 8"),
    ],
)
def test_a_bad_flag_value_gets_the_same_message(
    tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, *flags)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "near"),
    [(["--num-layer", "3"], "--num-layers"), (["--schedule.knd", "wsd"], "--schedule.kind")],
)
def test_unknown_flag_names_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], near: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        load(tmp_path, *flags)
    assert stop.value.code == 2
    assert near in capsys.readouterr().err


def test_a_section_of_the_wrong_type_is_named_also_under_flags(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model is 3"):
        load(tmp_path, "--num-layers", "2", tree=small_tree(model=3))


def test_extra_flags_are_the_commands_own(tmp_path: Path) -> None:
    assert load_both(tmp_path)[1] == Extra(dry_run=False)
    assert load_both(tmp_path, "--dry-run")[1] == Extra(dry_run=True)


def test_help_lists_every_field_and_alias(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # or long flags break over two lines
    with pytest.raises(SystemExit) as stop:
        load(tmp_path, "--help")
    assert stop.value.code == 0
    words = set(capsys.readouterr().out.replace(",", " ").split())
    yaml_only = {"multipliers.types", "multipliers.layers"}
    expected = {f"--{path.replace('_', '-')}" for path in set(leaf_paths(RunConfig)) - yaml_only}
    assert expected - words == set()
    assert set(MEGATRON_FLAGS.values()) - words == set()


def test_every_alias_belongs_to_a_field() -> None:
    assert set(MEGATRON_FLAGS) <= set(leaf_paths(RunConfig))


def test_merge_makes_a_new_tree() -> None:
    tree = {"a": {"b": 1, "c": 2}, "d": None}
    assert merge(tree, {"a": {"b": 3}, "d": {"e": 4}, "f": {}}) == {
        "a": {"b": 3, "c": 2},
        "d": {"e": 4},
    }
    assert tree == {"a": {"b": 1, "c": 2}, "d": None}


def test_run_command_prints_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(argv: object) -> int:
        raise DataError("the file x is empty; give another")

    assert run_command(fails) == 1
    assert capsys.readouterr().err == "error: the file x is empty; give another\n"
    assert run_command(lambda argv: 0) == 0


def test_run_command_leaves_defects_their_traceback() -> None:
    def breaks(argv: object) -> int:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_command(breaks)
