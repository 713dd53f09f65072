"""The small base of the checks and its way along the axes."""

from __future__ import annotations

import pytest

from megatron_completedp.check.sizes import base_run
from megatron_completedp.core.ratios import Ratios
from megatron_completedp.errors import ConfigError
from megatron_completedp.study.sizes import moved


def test_the_built_in_base_is_its_own_base() -> None:
    assert base_run(None).ratios == Ratios()
    assert base_run(None, "sp").rules.parametrization == "sp"


@pytest.mark.parametrize(
    ("axis", "ratio", "expected"),
    [
        ("width", 2, Ratios(m_N=2)),
        ("depth", 4, Ratios(m_L=4)),
        ("batch", 0.25, Ratios(m_B=0.25)),
        ("duration", 4, Ratios(m_D=4)),
    ],
)
def test_an_axis_moves_its_own_ratio_alone(axis: str, ratio: float, expected: Ratios) -> None:
    config = moved(base_run(None), axis, ratio)
    assert config.ratios == expected
    assert config.model.head_dim == base_run(None).model.head_dim


def test_a_size_without_whole_heads_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"width x 1\.3 turns hidden_size = 64 into 83\.2"):
        moved(base_run(None), "width", 1.3)
