"""Each check from its command line to its report: rows, verdict, figures, page. Tiny ladders.

What the checks can tell right from wrong is `test_check_ladders`' and `test_check_batch_curves`'.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_completedp.check import batch_runs, quadratic
from megatron_completedp.check.__main__ import main
from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.mcore.parallel import destroy_parallel, initialize_parallel
from megatron_completedp.mcore.platform import Platform
from tests.browser.chromium import Chromium
from tests.browser.test_report_page import BINARY, CONTENT_WIDTH, CONTRAST, IMAGES, WIDTHS

#: Two sizes a ladder and one seed: enough for every line of a report, too few for a fair verdict
#: in depth, which four times as many layers and a second seed would make dear.
LADDERS = ("--widths", "1", "4", "--depths", "1", "2", "--alphas", "1", "--seeds", "0")

#: The gradient check, the quickest, has both alphas.
BOTH_ALPHAS = ("--widths", "1", "4", "--depths", "1", "2", "--alphas", "1", "0.5", "--seeds", "0")

FLAGS = {
    "coordinate": LADDERS,
    "gradient": BOTH_ALPHAS,
    "eps": LADDERS,
    "sde": ("--batches", "1", "2", "--steps", "100", "--seeds", "0"),
}

FIGURES = {
    "coordinate": ["change_depth_alpha1", "change_width"],
    "gradient": ["gradient_depth_alpha0_5", "gradient_depth_alpha1", "gradient_width"],
    "eps": ["update_depth_alpha1", "update_width"],
    "sde": ["loss_over_tokens"],
}

#: Findings that each check must have by these names.
NAMED = {
    "coordinate": "width: slope of contribution of q, steps 2 to 20",
    "gradient": "width: slope of gradient of embedding, steps 0 to 10",
    "eps": "width: slope of update of embedding, step 0",
    "sde": "model: distance of the loss at batch x 2 from the base's (nats)",
}

#: Engines along the ladders, each measured once. The base is one engine in width, batch and
#: duration, and another in depth.
ROWS = {"coordinate": 6, "gradient": 5, "eps": 6, "sde": 3}

#: Of the quadratic, in place of 4096. Its spread is then known to 1.1 % alone; over its reference,
#: which the same noise drives, to less than the 2 % allowed.
CHAINS = 512

#: The exit code and the folder of a check, run once for all tests.
Ran = Callable[[str], tuple[int, Path]]


@pytest.fixture(scope="module")
def ran(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    destroy_parallel(keep_process_group=True)  # a new process has no groups
    done: dict[str, tuple[int, Path]] = {}

    def run(name: str) -> tuple[int, Path]:
        if name not in done:
            out = tmp_path_factory.mktemp(name)
            done[name] = main([name, *FLAGS[name], "--out", str(out)]), out
        return done[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quadratic, "CHAINS", CHAINS)
        quadratic.stationary_std.cache_clear()
        yield run
    # Other tests must not find what fewer chains gave.
    quadratic.stationary_std.cache_clear()
    initialize_parallel(platform, ParallelConfig(), timeout_s=60, seed=1234)


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return found


def rows(out: Path) -> list[dict[str, Any]]:
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", FLAGS)
def test_a_check_writes_its_rows_figures_and_report(ran: Ran, name: str) -> None:
    code, out = ran(name)
    found = report(out)
    findings = {finding["what"]: finding for finding in found["findings"]}
    assert code == (0 if found["passed"] else 1)
    assert found["passed"] == all(finding["passed"] for finding in findings.values())
    assert NAMED[name] in findings
    assert all(finding["value"] is not None for finding in findings.values()), "all was measured"
    assert len(rows(out)) == ROWS[name]
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        drawn = sorted(out.glob(f"*.{kind}"))
        assert [path.stem for path in drawn] == FIGURES[name]
        assert all(path.read_bytes().startswith(start) for path in drawn)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == len(FIGURES[name])
    assert found["verdict"] in page


@pytest.mark.parametrize("name", ["coordinate", "gradient", "eps"])
def test_the_rules_hold_in_width(ran: Ran, name: str) -> None:
    failed = [
        finding["what"] for finding in report(ran(name)[1])["findings"] if not finding["passed"]
    ]
    assert [what for what in failed if not what.startswith("depth")] == []


def test_the_sde_check_passes(ran: Ran) -> None:
    code, out = ran("sde")
    assert code == 0, report(out)["verdict"]


def test_the_sde_check_taken_up_again_trains_nothing_and_says_the_same(
    ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every check but this one rests on `Bench`, whose rows `test_check_ladders` takes up again."""
    code, out = ran("sde")
    before, kept = report(out), rows(out)
    monkeypatch.delattr(batch_runs, "Engine")
    assert main(["sde", *FLAGS["sde"], "--out", str(out)]) == code
    assert (report(out), rows(out)) == (before, kept)


@pytest.mark.slow  # `test_check_ladders` has the same control, of the table alone
@pytest.mark.usefixtures("ran")
def test_the_parametrization_asked_for_is_the_one_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Negative control by the command: sp has no width rule."""
    flags = ["--widths", "1", "2", "--depths", "1", "2", "--alphas", "1", "--seeds", "0"]
    flags += ["--parametrization", "sp", "--out", str(tmp_path)]
    assert main(["coordinate", *flags]) == 1
    found = report(tmp_path)
    assert found["settings"]["parametrization"] == "sp"
    failed = {finding["what"] for finding in found["findings"] if not finding["passed"]}
    assert {
        f"width: slope of contribution of {module}, steps 2 to 20" for module in "qkv"
    } <= failed
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.browser
@pytest.mark.skipif(BINARY is None, reason="no Chromium")
@pytest.mark.parametrize("name", ["coordinate", "sde"])
def test_a_browser_shows_the_report_of_a_real_run(ran: Ran, tmp_path: Path, name: str) -> None:
    assert BINARY is not None
    _, out = ran(name)
    with Chromium(BINARY, tmp_path) as browser:
        for width in WIDTHS:
            browser.open(out / "report.html", width=width)
            assert browser.evaluate(CONTENT_WIDTH) <= width, "the page does not scroll sideways"
            images = browser.evaluate(IMAGES)
            assert len(images) == len(FIGURES[name])
            assert all(natural > 0 and shown > 0 for natural, shown in images)
            assert browser.evaluate(CONTRAST) >= 4.5
            assert browser.complaints == []
