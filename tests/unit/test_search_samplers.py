"""Samplers by name: all of them run, quietly, within the bounds and from the same start."""

from __future__ import annotations

import sys
import warnings

import pytest

optuna = pytest.importorskip("optuna")

from megatron_completedp.errors import ConfigError  # noqa: E402
from megatron_completedp.search.samplers import make_sampler  # noqa: E402
from megatron_completedp.search.simulate import simulate  # noqa: E402
from megatron_completedp.search.surrogate import synthetic  # noqa: E402

#: What each needs beside Optuna; a sampler whose package is missing is skipped.
NEEDS = {"cmaes": "cmaes", "turbo": "botorch"}
NAMES = ["trust_region", "random", "qmc", "tpe", "cmaes", "gp", "turbo"]


@pytest.mark.parametrize("name", NAMES)
def test_a_sampler_runs_without_a_word_and_repeats_itself(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    surrogate = synthetic(3, seed=0)
    # Beyond the random first trials of gp (10) and turbo (twice the coordinates).
    settings = {"candidates": 50} if name == "turbo" else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        first, second = (
            simulate(surrogate, name, repeat=0, runs=14, settings=settings) for _ in range(2)
        )
    assert first == second
    assert len(first) == 14
    # The base is everyone's first run.
    assert first[0].loss == surrogate.level
    assert [str(w.message) for w in caught if "xperimental" in str(w.message)] == []
    assert capfd.readouterr().err == ""


def test_cmaes_begins_at_the_start_with_the_start_radius() -> None:
    """Its spread is what makes it comparable: by default it would begin with a third of the bounds.

    The first population's standard deviation in each coordinate is radius / sqrt(3) = 0.029.
    """
    pytest.importorskip("cmaes")
    space = synthetic(4).space
    start = dict.fromkeys(space, 1.0)
    study = optuna.create_study(
        sampler=make_sampler("cmaes", seed=0, space=space, start=start, radius=0.05)
    )
    for number in range(8):
        study.tell(study.ask(space), float(number))
    # The first is drawn at random, as always with Optuna's CMA-ES.
    values = [value for trial in study.trials[1:] for value in trial.params.values()]
    # Five standard deviations.
    assert max(abs(value - 1.0) for value in values) < 0.15


def test_an_absent_package_is_named_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "botorch", None)  # what an import takes for missing
    with pytest.raises(ConfigError, match=r"turbo needs botorch.*pip install '.*\[turbo\]'"):
        make_sampler("turbo", seed=0, space=synthetic(2).space)


def test_unknown_names_and_settings_are_refused() -> None:
    space = synthetic(2).space
    with pytest.raises(ConfigError, match="sampler 'bayes' is unknown; there are trust_region"):
        make_sampler("bayes", seed=0, space=space)
    with pytest.raises(ConfigError, match=r"sampler random: .*speed"):
        make_sampler("random", seed=0, space=space, settings={"speed": 3})


@pytest.mark.parametrize("name", ["trust_region", "random", "tpe"])
def test_a_seed_among_the_options_is_refused(name: str) -> None:
    """It would win over the one that each trial has, and all would be one point."""
    space = synthetic(2).space
    with pytest.raises(ConfigError, match=r"seed is 1 in its options.* the search's own seed"):
        make_sampler(name, seed=0, space=space, settings={"seed": 1})
    make_sampler(name, seed=1, space=space, settings={})  # negative control


def test_turbo_follows_its_algorithm() -> None:
    pytest.importorskip("botorch")
    from megatron_completedp.search.turbo import LEAST, SIDE, Box, box

    assert box([3.0, 2.0], 2, failures=4) == Box(SIDE, 0, 0)
    # Three successes in a row double the side, four failures halve it.
    assert box([9, 9, 8, 7, 6], 2, failures=4).side == 2 * SIDE
    assert box([9, 9, 8, 7, 7, 6, 5], 2, failures=4).side == SIDE
    assert box([9, 9, 9, 9, 9, 9], 2, failures=4).side == SIDE / 2
    # 0.8 / 2^7 is the first side below the least: 28 failures, and the next design begins.
    assert SIDE / 2**7 < LEAST < SIDE / 2**6
    assert box([9] * 30, 2, failures=4) == Box(SIDE, 30, 1)
    assert box([9] * 30 + [5, 5, 4, 3, 2], 2, failures=4) == Box(2 * SIDE, 30, 1)
