"""The samplers a search can name, all through Optuna's interface and from the same start.

| name         | what                                                   | needs           |
|--------------|--------------------------------------------------------|-----------------|
| trust_region | ours: `trust_region`                                   |                 |
| random       | uniform within the bounds                              |                 |
| qmc          | scrambled Sobol sequence                               |                 |
| tpe          | Optuna's tree-structured Parzen estimator              |                 |
| cmaes        | CMA-ES from the start, with the start radius as sigma  | cmaes           |
| gp           | Optuna's Gaussian process                              |                 |
| turbo        | TuRBO-1 from the start: `turbo`                        | botorch (extra) |
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import optuna
from optuna.distributions import FloatDistribution

from megatron_completedp.errors import ConfigError
from megatron_completedp.search.trust_region import TrustRegionSampler

SamplerName = Literal["trust_region", "random", "qmc", "tpe", "cmaes", "gp", "turbo"]

#: The packages that a sampler imports when it is first asked, and the extra that brings each.
_NEEDS: dict[str, dict[str, str]] = {
    "cmaes": {"cmaes": "search"},
    "turbo": {"botorch": "turbo"},
}


def make_sampler(
    name: str,
    *,
    seed: int,
    space: Mapping[str, FloatDistribution],
    start: Mapping[str, float] | None = None,
    radius: float | Mapping[str, float] = 0.5,
    kinds: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> optuna.samplers.BaseSampler:
    """The sampler `name` for `space`.

    `start`, `radius` and `kinds` (see `TrustRegionSampler`) go to those that can use them: random,
    qmc, tpe and gp only know the bounds. `settings` are further arguments of the sampler's
    constructor and win over ours, but for the seed; whole numbers may be floats, as YAML and JSON
    give them. Raises ConfigError for an unknown name or setting, for a seed among the settings, and
    for a sampler whose package is not installed, with the command that installs it.
    """
    if name not in get_args(SamplerName):
        raise ConfigError(
            f"sampler {name!r} is unknown; there are {', '.join(get_args(SamplerName))}"
        )
    for package, extra in _NEEDS.get(name, {}).items():
        _require(name, package, extra)
    if settings and "seed" in settings:
        raise ConfigError(
            f"sampler {name}: seed is {settings['seed']} in its options; expected none there: "
            "every trial would be drawn by that same one. Give the search's own seed instead."
        )
    make, arguments = _constructor(name, seed, space, dict(start or {}), radius, kinds or {})
    for key, value in (settings or {}).items():
        whole = isinstance(value, float) and value.is_integer()
        arguments[key] = int(value) if whole else value
    try:
        with quiet():
            return make(**arguments)
    except TypeError as error:
        raise ConfigError(f"sampler {name}: {error}") from None


def resolved_options(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the trust region's defaults filled in: later versions may change them."""
    ours = TrustRegionSampler.defaults() if name == "trust_region" else {}
    return {**ours, **settings}


def _constructor(
    name: str,
    seed: int,
    space: Mapping[str, FloatDistribution],
    start: dict[str, float],
    radius: float | Mapping[str, float],
    kinds: Mapping[str, str],
) -> tuple[Callable[..., optuna.samplers.BaseSampler], dict[str, Any]]:
    if name == "trust_region":
        ours = {"seed": seed, "space": space, "start": start, "radius": radius, "kinds": kinds}
        return TrustRegionSampler, ours
    if name == "random":
        return optuna.samplers.RandomSampler, {"seed": seed}
    if name == "turbo":
        # Imports botorch, which takes seconds.
        from megatron_completedp.search.turbo import TurboSampler

        return TurboSampler, {"seed": seed, "space": space, "start": start}
    # Optuna's draw the first trial's parameters one by one and would warn of it each time.
    common = {"seed": seed, "warn_independent_sampling": False}
    if name == "qmc":
        return optuna.samplers.QMCSampler, {**common, "scramble": True}
    if name == "tpe":
        return optuna.samplers.TPESampler, common
    if name == "gp":
        return optuna.samplers.GPSampler, common
    return optuna.samplers.CmaEsSampler, {**common, **_cmaes_start(space, start, radius)}


def _cmaes_start(
    space: Mapping[str, FloatDistribution],
    start: Mapping[str, float],
    radius: float | Mapping[str, float],
) -> dict[str, Any]:
    """CMA-ES's x0 and sigma0: the trust region's start and the typical width of its box.

    Optuna's CMA-ES maps the bounds to [0, 1], so the sigma that all coordinates share is the mean
    of radius / (high - low); a uniform box of radius r has the standard deviation r / sqrt(3).
    """
    axes = TrustRegionSampler(space=space, start=start, radius=radius).axes(space)
    widths = [axis.radius / (axis.high - axis.low) for axis in axes.values()]
    x0 = {name: axis.value(axis.start) for name, axis in axes.items()}
    return {"x0": x0, "sigma0": sum(widths) / len(widths) / 3**0.5}


def _require(name: str, package: str, extra: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        command = f"pip install 'megatron_completedp[{extra}]'"
        raise ConfigError(f"sampler {name} needs {package}, which is missing: {command}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Optuna's notices on experimental and deprecated features from the terminal.

    They are about Optuna's interface, which is our business, not the user's. Others pass.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module="optuna|megatron_completedp"
        )
        yield
