"""Where a browser is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.chromium import find_chromium

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(
    "name",
    [
        "chromium-1200/chrome-linux/chrome",
        "chromium_headless_shell-1200/chrome-linux/headless_shell",
        "chromium_headless_shell-1200/chrome-headless-shell-linux64/chrome-headless-shell",
    ],
)
def test_playwrights_cache_is_searched_after_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path))
    assert find_chromium() is None
    binary = tmp_path / name
    binary.parent.mkdir(parents=True)
    binary.touch()
    assert find_chromium() == str(binary)
    on_path = tmp_path / "bin" / "chromium"
    on_path.parent.mkdir()
    on_path.touch(mode=0o755)
    assert find_chromium() == str(on_path)
