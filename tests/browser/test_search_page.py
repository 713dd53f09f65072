"""The page of a search in a real browser: every figure there, nothing too wide, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_completedp.search.report import report
from megatron_completedp.study.page import write_report
from tests.browser.chromium import NAMES, Chromium, find_chromium
from tests.browser.test_report_page import CONTENT_WIDTH, CONTRAST, IMAGES, WIDTHS
from tests.search_report_samples import finished_study, search

BINARY = find_chromium()

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BINARY is None, reason=f"no Chromium: none of {', '.join(NAMES)}"),
]

#: progress, multipliers, profiles, cliffs, importance.
FIGURES = 5


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    assert BINARY is not None
    with Chromium(BINARY, tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a search with everything that a page can show, alone in its folder."""
    of = search(tmp_path_factory.mktemp("search"), level="types_x_depth")
    finished_study(of, 40)
    found = report(of, target=None, command="python -m megatron_completedp.search report")
    write_report(of.out, found)
    alone = tmp_path_factory.mktemp("mailed") / "report.html"
    alone.write_bytes((of.out / "report.html").read_bytes())
    return alone


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_whole_and_fits(
    browser: Chromium, page: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.evaluate(CONTENT_WIDTH) <= width, "the page itself does not scroll sideways"
    images = browser.evaluate(IMAGES)
    assert len(images) == FIGURES
    assert all(natural > 0 and shown > 0 for natural, shown in images)
    # WCAG 2 asks 4.5 of normal text.
    assert browser.evaluate(CONTRAST) >= 4.5
    assert browser.complaints == []
    outside = [url for url in browser.requests if not url.startswith("data:")]
    assert outside == [page.resolve().as_uri()]
    browser.screenshot(tmp_path / "page.png")


def test_the_page_says_what_a_reader_asks(browser: Chromium, page: Path) -> None:
    browser.open(page, width=1280)
    text = browser.evaluate("document.body.innerText")
    for part in (
        "Is the best point better",
        "best point",
        "device-hours",
        "diverged",
        "importance",
    ):
        assert part in text
