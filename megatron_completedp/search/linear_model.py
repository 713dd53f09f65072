"""In which direction a linear model of the losses falls.

One run says little about 79 numbers, but every run says something about all that it moved: ridge
regression adds that up, where a comparison of single points throws it away.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Candidates for the ridge, as parts of the model's largest eigenvalue: from none to all noise.
_RIDGES = np.geomspace(1e-4, 1e3, 29)


def descent(points: Floats, losses: Floats, groups: NDArray[np.int64]) -> Floats:
    """The unit vector of steepest descent, or zeros where the losses show no slope.

    The ridge is the one that makes the losses likeliest when slopes and noise are normal (empirical
    Bayes): the noisier they are, the more what single runs moved counts, and not its correlations.
    Within a group, losses further above the median than the lowest is below it are cut to there: a
    cliff is no slope.

    Args:
        points: [n, d], in units in which all coordinates are alike.
        losses: [n], finite.
        groups: [n], each with a level of its own, such as runs drawn from one region.

    Returns:
        [d]
    """
    points, losses = points.copy(), losses.copy()
    for group in np.unique(groups):
        own = groups == group
        median = np.median(losses[own])
        losses[own] = np.minimum(losses[own], 2 * median - losses[own].min())
        losses[own] -= losses[own].mean()
        points[own] -= points[own].mean(axis=0)
    total = losses @ losses
    values, vectors = np.linalg.eigh(points.T @ points)
    values = values.clip(min=0.0)
    slopes = vectors.T @ (points.T @ losses)
    # Less than this of the largest slope that there could be is rounding.
    if np.linalg.norm(slopes) <= 1e-9 * np.sqrt(total * values[-1]):
        return np.zeros(points.shape[1])
    ridges = values[-1] * _RIDGES[:, None]
    left = total - (slopes**2 / (values + ridges)).sum(axis=1)
    surprise = len(losses) * np.log(left) + np.log1p(values / ridges).sum(axis=1)
    slope: Floats = vectors @ (slopes / (values + ridges[surprise.argmin()]))
    direction: Floats = -slope / np.linalg.norm(slope)
    return direction
