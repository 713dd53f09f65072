"""TuRBO-1 on BoTorch as an Optuna sampler: the Gaussian-process peer of our trust region.

Eriksson et al., "Scalable Global Optimization via Local Bayesian Optimization", NeurIPS 2019
(arXiv 1910.01739), Algorithm 1 with their constants and batches of one: a Gaussian process on the
trials since the last restart, Thompson sampling from candidates in a box around the best of them,
whose side doubles after 3 successes in a row and halves after as many failures as there are
coordinates. Below the least side it starts again from other points.

Ours differs from the paper in three ways: the first point is the search's start rather than a
random one, candidates are uniform draws rather than a Sobol sequence, and a diverged run enters the
model as the worst run that ended well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gpytorch
import numpy as np
import optuna
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.generation import MaxPosteriorSampling
from botorch.models import SingleTaskGP
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from megatron_completedp.search.attributes import ended_well
from megatron_completedp.search.trust_region import TrustRegionSampler
from megatron_completedp.search.trust_trials import Reader

#: Side of the box, in units of the bounds: at the start, the largest, and below which it restarts.
SIDE, LARGEST, LEAST = 0.8, 1.6, 0.5**7

#: Successes in a row after which the box doubles.
SUCCESSES = 3

#: Relative gain that counts as a success.
GAIN = 1e-3


@dataclass(frozen=True)
class Box:
    """Where TuRBO is after its finished trials."""

    side: float
    first: int
    """Index of the first trial since the last restart."""
    restarts: int


def box(losses: Sequence[float], start_runs: int, failures: int) -> Box:
    """The box after `losses` in the order of the trials: a pure function, so that it resumes.

    The first `start_runs` after each restart are the initial design and do not move it.
    """
    side, first, restarts = SIDE, 0, 0
    won = lost = 0
    for i, loss in enumerate(losses):
        if i - first < start_runs:
            continue
        best = min(losses[first:i])
        success = loss < best - GAIN * abs(best)
        won, lost = (won + 1, 0) if success else (0, lost + 1)
        if won == SUCCESSES:
            side, won = min(2 * side, LARGEST), 0
        elif lost == failures:
            side, lost = side / 2, 0
        if side < LEAST:
            side, first, restarts, won, lost = SIDE, i + 1, restarts + 1, 0, 0
    return Box(side, first, restarts)


class TurboSampler(optuna.samplers.BaseSampler):
    """TuRBO-1 over the float parameters of `space`, for one objective; others are drawn at random.

    Args:
        seed: of the initial design and the samples; a proposal is drawn by (seed, slot), as that of
            the trust region, so that repetitions of lost trials change nothing.
        space: the float parameters.
        start: the first point, as for `TrustRegionSampler`.
        start_runs: size of the initial design after each restart; by default twice the number of
            coordinates as in the paper, but at most 20: budgets here are a few hundred runs.
        candidates: points that a Thompson sample chooses from; by default the paper's
            min(100 coordinates, 5000).
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        space: Mapping[str, FloatDistribution],
        start: Mapping[str, float] | None = None,
        start_runs: int | None = None,
        candidates: int | None = None,
    ) -> None:
        """See the class."""
        self._seed = seed
        self._space = dict(space)
        self._axes = TrustRegionSampler(space=space, start=start).axes(space)
        self._start_runs = start_runs or min(20, 2 * len(self._axes))
        self._candidates = candidates or min(100 * len(self._axes), 5000)
        self._random = optuna.samplers.RandomSampler(seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The parameters of the space."""
        self._raise_error_if_multi_objective(study)
        return dict(self._space)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """The next point: of the initial design, or the best of a Thompson sample."""
        sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        done = [
            other
            for other in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if all(name in other.params for name in self._axes)
        ]
        losses = _losses(done, sign)
        # One coordinate needs more than one failure to be given up.
        state = box(losses, self._start_runs, failures=max(4, len(self._axes)))
        slot = Reader().read(study, self._axes.keys(), without=trial.number).own
        points = np.array([self._unit(other.params) for other in done[state.first :]])
        if not slot:
            unit = self._unit({name: axis.value(axis.start) for name, axis in self._axes.items()})
        elif len(points) < self._start_runs:
            sobol = torch.quasirandom.SobolEngine(
                len(self._axes), scramble=True, seed=self._seed + state.restarts
            )
            # By slot, so that workers that ask at the same time get different points.
            unit = sobol.draw(slot + 1)[-1].double().numpy()
        else:
            unit = self._thompson(points, np.array(losses[state.first :]), state, slot)
        return {
            name: axis.value(axis.low + float(share) * (axis.high - axis.low))
            for (name, axis), share in zip(self._axes.items(), unit, strict=True)
        }

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A parameter outside the space, at random."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def _unit(self, params: Mapping[str, float]) -> np.ndarray:
        return np.array(
            [
                (axis.coordinate(params[name]) - axis.low) / (axis.high - axis.low)
                for name, axis in self._axes.items()
            ]
        )

    def _thompson(
        self, points: np.ndarray, losses: np.ndarray, state: Box, slot: int
    ) -> np.ndarray:
        x = torch.from_numpy(points)
        # A sample is chosen where it is highest; the model wants unit variance.
        y = -torch.from_numpy((losses - losses.mean()) / max(float(losses.std()), 1e-12))[:, None]
        model = _model(x, y)
        weights = model.covar_module.base_kernel.lengthscale.detach().reshape(-1)
        weights = weights / torch.exp(torch.log(weights).mean())
        centre = x[y.argmax()]
        low = (centre - weights * state.side / 2).clamp(0, 1)
        high = (centre + weights * state.side / 2).clamp(0, 1)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + slot)
        shape = (self._candidates, len(centre))
        inside = low + (high - low) * torch.rand(shape, generator=generator, dtype=x.dtype)
        # The paper moves about 20 coordinates of each candidate, at least one.
        moved = torch.rand(shape, generator=generator) <= min(1.0, 20 / len(centre))
        one = torch.randint(len(centre), (len(moved), 1), generator=generator)
        moved.scatter_(1, one, True)
        options = torch.where(moved, inside, centre)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self._seed * 1_000_003 + slot)
            sampling = MaxPosteriorSampling(model, replacement=False)
            return sampling(options, num_samples=1)[0].numpy()


def _losses(trials: Sequence[FrozenTrial], sign: int) -> list[float]:
    """Losses to minimize; what diverged gets that of the worst that did not."""
    values = [
        sign * trial.value if trial.value is not None and ended_well(trial) else math.nan
        for trial in trials
    ]
    worst = max((value for value in values if not math.isnan(value)), default=0.0)
    return [worst if math.isnan(value) else value for value in values]


def _model(x: torch.Tensor, y: torch.Tensor) -> SingleTaskGP:
    """The paper's Gaussian process: Matern-5/2 with a length scale for each coordinate."""
    kernel = gpytorch.kernels.ScaleKernel(
        gpytorch.kernels.MaternKernel(
            nu=2.5,
            ard_num_dims=x.shape[1],
            lengthscale_constraint=gpytorch.constraints.Interval(0.005, 4.0),
        )
    )
    noise = gpytorch.likelihoods.GaussianLikelihood(
        noise_constraint=gpytorch.constraints.Interval(1e-8, 1.0)
    )
    model = SingleTaskGP(x, y, covar_module=kernel, likelihood=noise, outcome_transform=None)
    likelihood = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(likelihood)
    return model
