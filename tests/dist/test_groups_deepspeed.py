"""DeepSpeed ZeRO on two processes trains as one process of plain torch does."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install -e '.[deepspeed]'")

from megatron_completedp.torch_engine import LLAMA, QWEN3
from tests.dist.harness import Results, run_cases
from tests.dist.test_groups import assert_equal

MODULE = "tests.dist.group_cases"
CASES = {"zero1": QWEN3, "zero2": QWEN3, "zero3": QWEN3, "zero2_llama": LLAMA}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    # DeepSpeed compiles a small communication library at its first use. In the user's folder a
    # process that was killed meanwhile leaves a lock behind, on which all later ones wait for ever.
    cases = [*CASES, "zero3_partitioned_at_birth", "zero2_levelled", "zero_checkpoints"]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("COMPLETEDP_TEST_FOLDER", str(tmp_path_factory.mktemp("zero")))
        environment.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        return run_cases(MODULE, cases, processes=2, timeout_s=1200)


@pytest.mark.parametrize("case", CASES)
def test_zero_losses_are_those_of_one_process(case: str, two: Results) -> None:
    assert_equal(two(case), CASES[case])


def test_partitioned_weights_are_those_of_one_process(two: Results) -> None:
    assert all(two("zero3_partitioned_at_birth"))


def test_a_schedule_of_deepspeeds_configuration_is_caught(two: Results) -> None:
    for message in two("zero2_levelled"):
        assert "of its peak learning rate" in message
        assert "lr_scheduler(optimizer, plan)" in message


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpoints_keep_groups_and_another_plans_is_caught(stage: int, two: Results) -> None:
    for of_rank in two("zero_checkpoints"):
        after_save, after_load, complaint = of_rank[stage]
        assert after_load == after_save
        assert "checkpoint of another plan" in complaint


@pytest.mark.slow
def test_deepspeeds_own_adam_keeps_every_group() -> None:
    """Slow: its kernel takes minutes to compile when first used."""
    case = "zero2_cpu_adam"
    assert_equal(run_cases(MODULE, [case], processes=2, timeout_s=1200)(case), QWEN3)
