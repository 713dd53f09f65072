"""In which direction a linear model of the losses falls.

One run says little about 79 numbers, but every run says something about all that it moved: a model
adds that up, where a comparison of single points throws it away.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

#: Steps of the ascent; variances of kinds that matter have settled long before.
_STEPS = 40

#: What the belief that all kinds matter alike weighs: as much as so many squares of a kind's slopes
#: would. Two dozen runs are likeliest, more often than not, if half of the kinds do not matter at
#: all, and not the right half.
_PRIOR = 4.0


def descent(points: Floats, losses: Floats, groups: Labels, kinds: Labels) -> Floats:
    """The unit vector of steepest descent, or zeros where the losses show no slope.

    Slopes and noise are taken to be normal, the slopes with a variance for each kind of coordinate.
    These variances are the most probable ones (restricted likelihood, inverse gamma priors with
    modes at which all kinds share alike): the noisier the losses, the less single runs count, and
    a kind that does not matter as a whole is, given enough runs, not followed where chance makes
    one of its coordinates look as if it did. Within a group, losses further above the median than
    the lowest is below it are cut to there: a cliff is no slope.

    Args:
        points: [n, d], in units in which all coordinates of a kind are alike.
        losses: [n], finite.
        groups: [n], each with a level of its own, such as runs drawn from one region.
        kinds: [d], of which each has slopes of its own size.

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
    # Less than this of the largest slope that there could be is rounding.
    largest = np.linalg.norm(losses) * np.linalg.norm(points, 2)
    if np.linalg.norm(points.T @ losses) <= 1e-9 * largest:
        return np.zeros(points.shape[1])
    named = [kinds == kind for kind in np.unique(kinds)]
    slope = _slopes(points, losses, len(np.unique(groups)), named)
    length = np.linalg.norm(slope)
    return -slope / length if length > 0 else np.zeros(points.shape[1])


def _slopes(points: Floats, losses: Floats, levels: int, kinds: list[Labels]) -> Floats:
    """The slopes' posterior mean [d]; each of the `levels` groups has the mean 0 in both."""
    gram, falls = points.T @ points, points.T @ losses
    # What is left of n runs once each group's level is taken out has fewer than n dimensions.
    freedom = len(losses) - levels
    total = float(losses @ losses) / freedom
    # Half of the scatter is noise, the kinds share the other half.
    noise = total / 2
    moved = [np.trace(gram[np.ix_(kind, kind)]) / freedom for kind in kinds]
    alike = [total / 2 / len(kinds) / (square or 1.0) for square in moved]
    sizes = list(alike)
    for _ in range(_STEPS):
        precision = np.zeros(len(falls))
        for size, kind in zip(sizes, kinds, strict=True):
            precision[kind] = noise / size
        inverse = np.linalg.inv(gram + np.diag(precision))
        slope = inverse @ falls
        # How many of a kind's slopes the losses have settled; the others are as the kind says.
        settled = [float(np.sum(1 - (precision * inverse.diagonal())[kind])) for kind in kinds]
        # Each is moved by the root of what the losses show over what it predicts, which never
        # lowers the likelihood (Zhou et al., arXiv 1509.07426); here both with the prior's part.
        sizes = [
            np.sqrt(size * (np.sum(slope[kind] ** 2) + _PRIOR * mode) / (count + _PRIOR))
            for size, kind, mode, count in zip(sizes, kinds, alike, settled, strict=True)
        ]
        rest = losses - points @ slope
        noise = np.sqrt(noise * float(rest @ rest) / max(freedom - sum(settled), 1e-9))
        noise = max(noise, 1e-9 * total)
    found: Floats = slope
    return found
