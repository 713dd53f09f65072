"""The plan command: its JSON, its text, and that it stays light enough for any machine."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_samples import small_tree

from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.__main__ import main


def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], *flags: str, **changes: Any) -> str:
    """What `plan` prints for the sample run with `changes`."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(small_tree(**changes)), encoding="utf-8")
    assert main(["--config", str(path), *flags]) == 0
    return capsys.readouterr().out


PROFILE = {
    "multipliers.types": {"q": {"lr_mult": 3, "eps_mult": 2, "one_minus_beta1_mult": 0.5}},
    "multipliers.depth.lr_mult": [0.5, 2],
    "multipliers.depth.attention_residual_mult": [2, 0.5],
}


def test_json_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(plan(tmp_path, capsys, "--json", **PROFILE))
    assert set(data) == {
        *("parametrization", "depth_alpha", "duration_exponent", "final_norm_eps"),
        *("depth_weight_decay", "ratios", "modules", "residual", "logit_multiplier", "notes"),
        "parameters",
        "flops",
        "steps",
    }
    assert data["parametrization"] == "completedp"
    assert data["ratios"] == {"m_N": 2.0, "m_L": 2.0, "m_B": 2.0, "m_D": 2.0}
    assert data["steps"] == 100
    assert data["flops"] == 6 * data["parameters"] * 12800
    assert len(data["modules"]) == 3 + 11 * 4  # outside the stack + per layer, with a gate
    for entry in data["modules"]:
        assert set(entry) == {
            *("module", "layer", "role", "lr", "weight_decay", "eps"),
            *("beta1", "beta2", "init_std", "factors"),
        }
        outside = entry["module"] in ("embedding", "final_norm", "unembedding")
        assert (entry["layer"] is None) == outside
    assert [entry["layer"] for entry in data["residual"]] == [0, 1, 2, 3]
    assert data["residual"][0] == {"layer": 0, "attention": 1.0, "mlp": 0.5}  # 2 x m_L^-1


def test_factors_multiply_to_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The explanation is the computation: base x every factor is what the module trains with."""
    data = json.loads(plan(tmp_path, capsys, "--json", **PROFILE))
    for entry in data["modules"]:
        for name, factors in entry["factors"].items():
            numbers = [value for value in factors.values() if not isinstance(value, str)]
            shown = 1 - entry[name[-5:]] if name.startswith("one_minus") else entry[name]
            # 1e-9 relative: a product of eight floats; 1 - beta cancels about three digits.
            assert math.isclose(math.prod(numbers), shown, rel_tol=1e-9)


def test_known_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice the width, batch and tokens, depth x2 at alpha 1: m_S = 1, so only m_N and m_L act."""
    data = json.loads(plan(tmp_path, capsys, "--json"))
    by_module = {(entry["module"], entry["layer"]): entry for entry in data["modules"]}
    # 1e-12: m_B^1/2 m_D^-1/2 is sqrt(2) / sqrt(2), a rounding away from 1.
    assert by_module["q", 0]["lr"] == pytest.approx(0.01 / 2, rel=1e-12)
    assert by_module["q", 0]["eps"] == pytest.approx(1e-8 / 4, rel=1e-12)
    assert by_module["embedding", None]["lr"] == pytest.approx(0.01, rel=1e-12)
    assert by_module["unembedding", None]["init_std"] == pytest.approx(0.02 / 2, rel=1e-12)
    assert by_module["q_norm", 3]["init_std"] is None


def test_own_base_prints_the_users_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(plan(tmp_path, capsys, "--json", base=None))
    assert {entry["lr"] for entry in data["modules"]} == {0.01}
    assert {entry["eps"] for entry in data["modules"]} == {1e-8}


@pytest.mark.parametrize("changes", [{}, PROFILE, {"parametrization": "sp"}])
def test_text_fits_a_terminal_and_collapses_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    lines = plan(tmp_path, capsys, **changes).splitlines()
    assert max(map(len, lines)) <= 120
    assert any(line.split()[:2] == ["mlp_norm", "0-3"] for line in lines) or changes
    assert len([line for line in lines if line.startswith("embedding ")]) == 1


def test_text_shows_every_factor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(tmp_path, capsys, **PROFILE)
    header = ["base", "type", "depth", "m_N", "m_L", "m_B", "m_D", "=", "value"]
    assert [line.split()[2:] for line in text.splitlines()].count(header) == 6  # hyperparameters
    row = next(line for line in text.splitlines() if line.split()[:2] == ["q", "0"])
    assert "0.0075" in row  # lr of q in layer 0: 0.01 x 3 x 0.5 / 2
    assert "m_N 2 (width)" in text


def test_a_bad_config_is_a_config_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="unknown key zzz"):
        plan(tmp_path, capsys, zzz=1)


LARGE = {
    "7.2B": ["--num-layers", "32", "--hidden-size", "4096", "--num-attention-heads", "32"],
    "175B": ["--num-layers", "96", "--hidden-size", "12288", "--num-attention-heads", "96"],
}

#: Runs the command where torch, numpy and megatron cannot be found and 1 GiB is all there is.
GUARDED = """
import resource, runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy", "megatron"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
runpy.run_module("megatron_completedp.plan", run_name="__main__")
"""


@pytest.mark.parametrize(("size", "form"), [("7.2B", []), ("175B", []), ("175B", ["--json"])])
def test_large_plans_are_quick_and_need_no_torch(
    tmp_path: Path, size: str, form: list[str]
) -> None:
    """Within 2 s of processor time in the better of two runs; the rest is a busy machine's."""
    flags = LARGE[size]
    hidden, heads = int(flags[3]), int(flags[5])
    base = {
        "hidden_size": hidden // 8,
        "ffn_hidden_size": hidden // 2,
        "num_attention_heads": heads // 8,
        "head_dim": 128,
        "num_layers": 4,
        "batch_tokens": 2**17,
        "train_tokens": 1_600_000_000,
    }
    path = tmp_path / "run.yaml"
    # A depth profile is the worst case: no two layers agree.
    profile = {"multipliers.depth.lr_mult": [0.5, 1, 1, 2]}
    path.write_text(yaml.safe_dump(small_tree(base=base, **profile)), encoding="utf-8")
    large = ["--ffn-hidden-size", str(4 * hidden), "--kv-channels", "128", "--seq-length", "2048"]
    large += ["--vocab-size", "50_277", "--global-batch-size", "512"]
    large += ["--training.train-tokens", "155e9", *flags, *form]
    command = [sys.executable, "-c", GUARDED, "--config", str(path), *large]
    seconds = []
    for _ in range(2):
        before = _children_seconds()
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        seconds.append(_children_seconds() - before)
        assert done.returncode == 0, done.stderr
        assert "unembedding" in done.stdout
    assert min(seconds) < 2.0


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("line", "error"),
    [("import torch", b"ModuleNotFoundError"), ("bytes(2**30)", b"MemoryError")],
)
def test_the_guard_catches_torch_and_memory(line: str, error: bytes) -> None:
    """Negative control: what the guard forbids does stop the command."""
    guarded = GUARDED.replace("runpy.run_module", f"{line}; runpy.run_module")
    done = subprocess.run([sys.executable, "-c", guarded], capture_output=True, check=False)
    assert done.returncode != 0
    assert error in done.stderr


def test_command_line_errors(tmp_path: Path) -> None:
    """A config error is one line on stderr and exit code 2, without a traceback."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(small_tree(zzz=1)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_completedp.plan", "--config", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown key zzz")
    assert len(done.stderr.splitlines()) == 1
