"""Report and index in a real browser: nothing missing, nothing fetched, nothing too wide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_completedp.study.page import IndexEntry, write_index, write_report
from tests.browser.chromium import NAMES, Chromium, find_chromium
from tests.report_samples import sample_report

BINARY = find_chromium()

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BINARY is None,
        reason=f"no Chromium: none of {', '.join(NAMES)} is on PATH and Playwright's cache has "
        "none; `apt-get install chromium` or `playwright install chromium` brings one",
    ),
]

#: A laptop's window and a phone's.
WIDTHS = (1280, 400)

#: Not against innerWidth, which grows with the content on phones.
CONTENT_WIDTH = "document.documentElement.scrollWidth"
#: Images that are not decoded yet would have no size yet.
IMAGES = (
    "Promise.all([...document.images].map(i => i.decode().catch(() => null)))"
    ".then(() => [...document.images].map(i => [i.naturalWidth, i.clientWidth]))"
)
#: Contrast ratio (WCAG 2) of the element's text to what lies under it.
CONTRAST = """(() => {
  const light = (color) => {
    const part = color.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const under = (node) => {
    const color = getComputedStyle(node).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" ? under(node.parentElement) : color;
  };
  return Math.min(...[...document.querySelectorAll("p, td, th, small, b, li, figcaption, h1, h2")]
    .map(node => {
      const pair = [light(getComputedStyle(node).color), light(under(node))];
      return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    }));
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    assert BINARY is not None
    with Chromium(BINARY, tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    write_report(folder / "failed", sample_report(passing=False))
    write_report(folder / "passed", sample_report(passing=True))
    entries = [
        IndexEntry(name="sde", verdict="PASSED", passed=True, href="passed/report.html"),
        IndexEntry(name="eps", verdict="FAILED: " + "x" * 200, passed=False, href=None),
    ]
    write_index(folder, "Checks", entries)
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", ["failed/report.html", "passed/report.html", "index.html"])
def test_a_page_is_whole_and_fits(
    browser: Chromium, folder: Path, page: str, width: int, dark: bool
) -> None:
    browser.open(folder / page, width=width, dark=dark)
    assert browser.evaluate(CONTENT_WIDTH) <= width, "the page itself does not scroll sideways"
    images = browser.evaluate(IMAGES)
    assert len(images) == (0 if page == "index.html" else 3)
    assert all(natural > 0 and shown > 0 for natural, shown in images)
    # WCAG 2 asks 4.5 of normal text.
    assert browser.evaluate(CONTRAST) >= 4.5
    assert browser.complaints == []


def test_a_mailed_page_needs_nothing_beside_it(
    browser: Chromium, folder: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "report.html"
    alone.write_bytes((folder / "failed" / "report.html").read_bytes())
    browser.open(alone, width=1280)
    assert all(natural > 0 for natural, _ in browser.evaluate(IMAGES))
    outside = [url for url in browser.requests if not url.startswith("data:")]
    assert outside == [alone.resolve().as_uri()]


def test_the_verdict_is_above_the_fold_on_a_phone(browser: Chromium, folder: Path) -> None:
    browser.open(folder / "failed" / "report.html", width=400)
    top = "document.querySelector('.verdict').getBoundingClientRect().bottom"
    # Half of the 800 pixels of the window.
    assert browser.evaluate(top) < 400
    assert browser.evaluate("document.querySelector('.verdict').textContent").startswith("FAILED")


def test_text_is_shown_as_written(browser: Chromium, folder: Path) -> None:
    """Markup in notes and settings stays text."""
    browser.open(folder / "failed" / "report.html", width=1280)
    text = browser.evaluate("document.body.innerText")
    for written in ("<layer 0> & its", "<synthetic>", "Bias <b> is not seen."):
        assert written in text


def test_the_index_leads_to_the_report(browser: Chromium, folder: Path) -> None:
    browser.open(folder / "index.html", width=1280)
    target = browser.evaluate("document.querySelector('a').href")
    assert target == (folder / "passed" / "report.html").resolve().as_uri()


@pytest.mark.parametrize(
    ("body", "finds"),
    [
        ("<div style='width:2000px'>wide</div>", "overflow"),
        ("<img src='missing.png'>", "image"),
        ("<script>console.error('x')</script>", "complaint"),
        ("<p style='color:#aaa;background:#fff'>pale</p>", "contrast"),
    ],
)
def test_the_browser_sees_a_broken_page(
    browser: Chromium, tmp_path: Path, body: str, finds: str
) -> None:
    """Negative control: each thing that the tests above look for is found where it is wrong."""
    page = tmp_path / "broken.html"
    page.write_text(
        "<!doctype html><meta name=viewport content='width=device-width'>"
        f"<body style='background:#fff;color:#000'><p>text</p>{body}",
        encoding="utf-8",
    )
    browser.open(page, width=400)
    found = {
        "overflow": browser.evaluate(CONTENT_WIDTH) > 400,
        "image": any(natural == 0 for natural, _ in browser.evaluate(IMAGES)),
        "complaint": any("exceptionDetails" in c or "args" in c for c in browser.complaints),
        "contrast": browser.evaluate(CONTRAST) < 4.5,
    }
    assert [name for name, seen in found.items() if seen] == [finds]
