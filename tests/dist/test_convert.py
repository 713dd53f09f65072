"""Checkpoints of any layout become the same Hugging Face model, and start runs of any layout."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from tests.dist.harness import Results, run_cases

CASES = "tests.dist.convert_cases"
TWO = ["tp2", "pp2", "pp2_vpp2", "dp2_sharded"]
FOUR = ["tp2_pp2"]

#: fp32 sums in another order; a shard in the wrong place makes 1e-2 or more.
LOGITS, LOSS = 1e-5, 1e-6


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Each launch converts or loads what the one before it has written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPLETEDP_TEST_FOLDER", str(tmp_path_factory.mktemp("convert")))
        first = run_cases(CASES, ["text", "plain", "start_one"], processes=1, timeout_s=300)
        cases = [f"train_{name}" for name in TWO] + ["start_tp2", "start_pp2_vpp2"]
        cases += ["start_dp2_sharded"]
        two = run_cases(CASES, cases, processes=2, timeout_s=300)
        four = run_cases(CASES, ["train_tp2_pp2", "start_tp2_pp2"], processes=4, timeout_s=300)
        names = [f"convert_{name}" for name in (*TWO, *FOUR)]
        convert = run_cases(CASES, names, processes=1, timeout_s=300)
    return SimpleNamespace(first=first, two=two, four=four, convert=convert)


@pytest.mark.parametrize("layout", [*TWO, *FOUR])
def test_every_layout_converts(layout: str, results: SimpleNamespace) -> None:
    trained: Results = results.two if layout in TWO else results.four
    trained(f"train_{layout}")
    (found,) = results.convert(f"convert_{layout}")
    assert found["problems"] == []
    assert found["max_difference"] < LOGITS
    assert found["largest_logit"] > 0.05, "nothing was compared"


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2_vpp2", "dp2_sharded", "tp2_pp2"])
def test_a_run_of_any_layout_starts_from_hugging_face(
    layout: str, results: SimpleNamespace
) -> None:
    """After a trip there and back the loss is what it was, and goes on falling."""
    launch = {"one": results.first, "tp2_pp2": results.four}.get(layout, results.two)
    (expected,) = results.first("plain")
    for found in launch(f"start_{layout}"):
        assert found["started"] == pytest.approx(expected, rel=LOSS)
        assert found["fresh"] - found["started"] > 0.01
        assert found["trained"] != found["started"], "the optimizer trains these very weights"
