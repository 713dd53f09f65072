"""The frame of the command: names, settings, exit codes, and which files are written by whom."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from megatron_completedp.check import suite
from megatron_completedp.check.__main__ import CHECKS, Check, main
from megatron_completedp.check.settings import command_line, load_settings
from megatron_completedp.errors import ConfigError
from megatron_completedp.study.report import Finding, Report


@dataclass(frozen=True, kw_only=True)
class FakeSettings:
    """Settings of a check that measures nothing."""

    run: str | None = None
    """The base."""
    widths: tuple[int, ...] = (64, 128)
    """Sizes of the ladder."""
    value: float = 0.0
    """What the finding will be."""


def _run(settings: FakeSettings, out: Path) -> Report:
    found = Finding(what="value", value=settings.value, low=0, high=1)
    return Report(title="Fake", question="Is it?", command="fake", findings=(found,), settings={})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("fake_check")
    module.FakeSettings = FakeSettings  # type: ignore[attr-defined]
    module.run = _run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_check", module)
    entry = Check("fake_check", "FakeSettings", "Is it?", "--widths 64 128")
    monkeypatch.setitem(CHECKS, "fake", entry)


def _load(argv: list[str]) -> tuple[FakeSettings, Path]:
    return load_settings(FakeSettings, argv, name="fake", description="A test.")


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("value", "code"), [("0.5", 0), ("2", 1)])
def test_the_exit_code_is_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str, code: int
) -> None:
    assert main(["fake", "--out", str(tmp_path / "out"), "--value", value]) == code
    assert json.loads((tmp_path / "out" / "report.json").read_text())["passed"] is (code == 0)
    assert (tmp_path / "out" / "report.html").exists()
    printed = capsys.readouterr().out
    assert ("PASSED" if code == 0 else "FAILED") in printed
    assert "report.html" in printed


@pytest.mark.usefixtures("fake")
def test_only_rank_0_writes_prints_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher ends all ranks at the first that fails, rank 0 in the middle of its report."""
    monkeypatch.setenv("RANK", "1")
    assert main(["fake", "--out", str(tmp_path / "out"), "--value", "2"]) == 0
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


def test_flags_beat_yaml_and_yaml_beats_defaults(tmp_path: Path) -> None:
    config = tmp_path / "check.yaml"
    config.write_text("widths: [64, 256]\nvalue: 0.25\nout: from_yaml\n")
    settings, out = _load(["--config", str(config), "--value", "5e-1"])
    assert settings == FakeSettings(widths=(64, 256), value=0.5)
    assert out == Path("from_yaml")
    _, out = _load(["--config", str(config), "--out", "from_flag"])
    assert out == Path("from_flag")
    assert _load([]) == (FakeSettings(), Path("runs/checks/fake"))


def test_a_run_is_looked_for_beside_the_yaml_that_names_it(tmp_path: Path) -> None:
    config = tmp_path / "check.yaml"
    config.write_text("run: run.yaml\n")
    assert _load(["--config", str(config)])[0].run == str(tmp_path / "run.yaml")
    assert _load([f"--config={config}"])[0].run == str(tmp_path / "run.yaml")
    assert _load(["--config", str(config), "--run", "here.yaml"])[0].run == "here.yaml"
    assert _load(["--run", "here.yaml"])[0].run == "here.yaml"
    config.write_text("run: ''\n")
    assert _load(["--config", str(config)])[0].run == "", "empty is no path"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("width: [64]", "did you mean widths"),
        ("widths: [64.5]", r"widths\[0\] is 64.5"),
        ("out: 3", "out is 3"),
        ("value: high", "value is 'high'"),
    ],
)
def test_bad_yaml_is_named(tmp_path: Path, text: str, named: str) -> None:
    config = tmp_path / "check.yaml"
    config.write_text(text)
    with pytest.raises(ConfigError, match=named):
        _load(["--config", str(config)])


def test_an_unknown_check_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean coordinate"):
        main(["cordinate"])
    with pytest.raises(ConfigError, match="expected one of coordinate"):
        main(["zzz"])


def test_the_usage_lists_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in [*CHECKS, "all"])
    assert "Example:" in text
    assert main([]) == 2, "no check is a usage error"


@pytest.mark.usefixtures("fake")
def test_the_help_of_a_check_has_its_fields_and_an_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fake", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for part in ("--widths", "Sizes of the ladder", "--out", "--config", "Example:", "64 128"):
        assert part in text


def test_the_usage_needs_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys; from megatron_completedp.check.__main__ import main; main(['--help']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'megatron')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_usage_errors_leave_with_2() -> None:
    base = [sys.executable, "-m", "megatron_completedp.check", "nonsense"]
    done = subprocess.run(base, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown check 'nonsense'")


def test_the_command_line_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x/__main__.py", "sde", "--out", "a folder"])
    assert command_line() == "python -m megatron_completedp.check sde --out 'a folder'"


#: Stands for the command in a suite: passes, fails, writes no report, or lies about its report.
CHILD = """
import json, sys
from pathlib import Path
name, out = sys.argv[1], Path(sys.argv[3])
out.mkdir(parents=True, exist_ok=True)
if name != "crash":
    passed = name != "fail"
    report = {"passed": passed, "verdict": "PASSED: x" if passed else "FAILED: x"}
    (out / "report.json").write_text(json.dumps(report))
sys.exit({"pass": 0, "fail": 1, "crash": 1, "killed": 3}[name])
"""


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    real = subprocess.run
    monkeypatch.setattr(
        suite.subprocess, "run", lambda argv, **kw: real([argv[0], child, *argv[3:]], **kw)
    )


@pytest.mark.usefixtures("children")
@pytest.mark.parametrize(
    ("names", "code"),
    [(("pass",), 0), (("pass", "fail"), 1), (("crash", "pass"), 1), (("killed",), 1)],
)
def test_the_suite_runs_every_check_and_fails_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], code: int
) -> None:
    monkeypatch.setattr(suite, "SUITE", names)
    assert main(["all", "--out", str(tmp_path / "out")]) == code
    page = (tmp_path / "out" / "index.html").read_text()
    for name in names:
        assert (f'href="{name}/report.html"' in page) is (name != "crash")
    assert ("PASSED: every check" in page) is (code == 0)


@pytest.mark.usefixtures("children")
def test_an_old_report_does_not_stand_for_a_check_that_crashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "out" / "crash" / "report.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"passed": true, "verdict": "PASSED: long ago"}')
    monkeypatch.setattr(suite, "SUITE", ("crash",))
    assert main(["all", "--out", str(tmp_path / "out")]) == 1
    assert "exit code 1 before a report" in (tmp_path / "out" / "index.html").read_text()


def test_the_suite_is_made_of_checks() -> None:
    assert set(suite.SUITE) == set(CHECKS) - {"mutation"}
