"""Verdicts, the files of a report, and the style that figures share."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from megatron_completedp.study.page import IndexEntry, write_index, write_report
from megatron_completedp.study.plot import COLORS, label_lines, ladder_colors, log2_axis, render
from megatron_completedp.study.report import FigureSpec, Finding, Report, print_report, report_json
from tests.report_samples import sample_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a report that fails."""
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, sample_report(passing=False))
    return folder


def finding(value: float, low: float = -0.1, high: float = 0.1) -> Finding:
    return Finding(what="slope", value=value, low=low, high=high)


def report(*findings: Finding) -> Report:
    return Report(title="T", question="Q?", command="c", findings=findings, settings={})


@pytest.mark.parametrize(
    ("value", "passed"),
    [(0.0, True), (0.1, True), (-0.1, True), (0.1001, False), (math.nan, False), (math.inf, False)],
)
def test_a_finding_passes_within_its_bounds_alone(value: float, passed: bool) -> None:
    assert finding(value).passed is passed


def test_bounds_in_words() -> None:
    assert finding(0).bounds == "-0.1 to 0.1"
    assert finding(0, low=-math.inf).bounds == "at most 0.1"
    assert finding(0, high=math.inf).bounds == "at least -0.1"
    assert finding(0, low=-math.inf, high=math.inf).bounds == "any number"
    assert replace(finding(0, high=math.inf), strict=True).bounds == "above -0.1"


def test_a_strict_bound_is_no_pass() -> None:
    assert not replace(finding(-0.1), strict=True).passed
    assert replace(finding(-0.0999), strict=True).passed


def test_one_failed_finding_fails_the_report() -> None:
    assert report(finding(0), finding(0)).passed
    failed = report(finding(0), finding(1))
    assert not failed.passed
    assert failed.verdict == "FAILED: 1 of 2 findings outside their bounds"


def test_a_report_that_found_nothing_fails() -> None:
    assert not report().passed
    assert report().verdict == "FAILED: nothing was measured"
    compared = finding(3.0, low=-math.inf, high=math.inf)
    assert report(finding(0), compared).verdict == "PASSED: 1 of 1 findings within their bounds"
    assert report(compared).verdict == "FAILED: nothing was measured"


def test_the_terminal_reads_the_failures_first() -> None:
    text = print_report(sample_report(passing=False))
    lines = text.splitlines()
    assert lines[1].startswith("FAILED: 2 of 20")
    results = [line.split()[0] for line in lines if re.match(r"(ok|FAIL) ", line)]
    assert results == ["FAIL"] * 2 + ["ok"] * 18


def test_the_json_is_strict(folder: Path) -> None:
    """NaN and infinity are no JSON: other readers would stop at them."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    assert data == report_json(sample_report(passing=False))
    assert data["passed"] is False
    assert data["findings"][3]["low"] is None
    assert data["findings"][5]["value"] is None


def test_every_figure_has_both_files_and_the_page_embeds_them(folder: Path) -> None:
    for name in ("width", "again", "panels"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (folder / f"{name}.svg").read_bytes()
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 3
    # Offline and inert: no script, and no address of anything but embedded data.
    assert "<script" not in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "@import" not in page


def test_the_same_report_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """So that committed figures change only when their data do."""
    write_report(tmp_path, sample_report(passing=False))
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_text_is_escaped(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "&lt;layer 0&gt; &amp; its" in page
    assert "<layer 0>" not in page


def test_the_style_ends_with_the_figure() -> None:
    before = mpl.rcParams["axes.grid"]
    seen = []
    spec = FigureSpec(
        name="x", caption="", draw=lambda figure: seen.append(mpl.rcParams["axes.grid"])
    )
    render(spec)
    assert (seen, before, mpl.rcParams["axes.grid"]) == ([True], False, False)


def test_labels_at_line_ends_do_not_overlap() -> None:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for index in range(5):
        axes.plot([1, 2, 3], [1, 2, 3 + 0.001 * index], label=f"line {index}")
    axes.plot([1, 2, 3], [0, 0, math.nan], label="diverged")
    axes.axhline(1)
    label_lines(axes)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 6, "one per labelled line, none for the unnamed one"
    assert not any(
        box.overlaps(other) for index, box in enumerate(boxes) for other in boxes[:index]
    )
    order = [text.get_text() for text in sorted(axes.texts, key=lambda t: t.get_window_extent().y0)]
    assert order == ["diverged", *(f"line {index}" for index in range(5))]


def test_lines_far_apart_are_labelled_at_their_height() -> None:
    """Spreading moves only what would collide."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for height in (0, 1, 2):
        axes.plot([1, 2], [height, height], label=str(height))
    label_lines(axes)
    assert [text.xyann[1] for text in axes.texts] == pytest.approx([0, 0, 0])


def test_sizes_are_written_as_plain_numbers() -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([64, 512], [1, 1])
    log2_axis(axes, [0.25, 64, 1_638_400])
    figure.draw_without_rendering()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.25", "64", "1,638,400"]


def _luminance(color: str | tuple[float, ...]) -> float:
    """Relative luminance of WCAG 2."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("color", [*COLORS, *ladder_colors(6)])
def test_every_colour_stands_out_from_white(color: str | tuple[float, ...]) -> None:
    """WCAG 2 asks a contrast of 3 of the parts of a figure."""
    assert 1.05 / (_luminance(color) + 0.05) >= 3


def test_a_ladder_goes_from_dark_to_light() -> None:
    shades = [_luminance(color) for color in ladder_colors(5)]
    assert shades == sorted(shades)
    assert len(ladder_colors(1)) == 1


def test_the_index_says_what_failed_and_what_has_not_run(tmp_path: Path) -> None:
    passed, failed, pending = (
        IndexEntry(name="sde", verdict="PASSED: 3 of 3", passed=True, href="sde/report.html"),
        IndexEntry(name="eps", verdict="FAILED: no <report>", passed=False, href=None),
        IndexEntry(name="gradient", verdict="not run yet", passed=None, href=None),
    )

    def page(*entries: IndexEntry) -> str:
        write_index(tmp_path, "Checks", entries)
        return (tmp_path / "index.html").read_text()

    text = page(passed, failed, pending)
    assert "FAILED: 1 of 3 checks" in text
    assert '<a href="sde/report.html">sde</a>' in text
    assert "no &lt;report&gt;" in text
    assert "PASSED: every check" in page(passed)
    # An interrupted suite has passed nothing.
    assert "PASSED: every check" not in page(passed, pending)
    assert "UNFINISHED: 1 of 2 checks have not run" in page(passed, pending)
