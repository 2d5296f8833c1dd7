"""95% intervals: Wilson's for proportions, the bootstrap over images for everything else, and one for the mean."""

import math
from collections.abc import Callable, Sequence
from statistics import stdev

import numpy as np

from focalclip.evaluation.metrics.definitions import Floats

Z95 = 1.959963984540054  # 97.5% point of the standard normal distribution

BOOTSTRAP_DRAWS = 1000

_BLOCK = 2_000_000  # image weights held at once, 16 MB

Interval = tuple[float, float]


def t975(degrees: int) -> float:
    """97.5% point of Student's t, to the four decimals of printed tables."""
    from scipy.special import stdtrit

    return round(float(stdtrit(degrees, 0.975)), 4)


def half_interval(values: Sequence[float]) -> float | None:
    """Half of the 95% interval of the mean, t with n - 1 degrees of freedom; None for fewer than two values."""
    return t975(len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def wilson_interval(correct: float, n: float) -> Interval:
    """95% Wilson score interval of a proportion (Wilson, 1927): honest also near 0, near 1 and for small n.

    An effective sample size, and what is correct of it, may be fractions.
    """
    p, z2 = correct / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_draws(
    statistic: Callable[[Floats], Floats], n: int, draws: int = BOOTSTRAP_DRAWS, seed: int | Sequence[int] = 0
) -> Floats:
    """Values of a statistic over resamples of n images, corrected for the bootstrap's own bias.

    Resampling repeats images, and repeats raise the 11-point mAP of weak scores: the draws are shifted so that their
    mean is the value itself.

    Args:
        statistic: takes weights (draws, n), how often each image was drawn, and gives (draws,).
        n: number of images.
        draws: number of resamples.
        seed: of the resampling; the same seed gives the same draws.

    Returns:
        (draws,), not a number where the statistic is not defined on a resample.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, min(draws, _BLOCK // n))
    blocks = []
    for start in range(0, draws, rows):
        picks = rng.integers(n, size=(min(rows, draws - start), n))
        blocks.append(statistic(np.stack([np.bincount(row, minlength=n) for row in picks]).astype(np.float64)))
    values = np.concatenate(blocks)
    return values - np.nanmean(values) + statistic(np.ones((1, n)))


def percentile_interval(draws: Floats) -> Interval:
    """The middle 95% of bootstrap draws."""
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_interval(
    statistic: Callable[[Floats], Floats], n: int, draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> Interval:
    """95% percentile bootstrap over n images of a statistic in [0, 1]; arguments as for :func:`bootstrap_draws`."""
    low, high = percentile_interval(bootstrap_draws(statistic, n, draws, seed))
    return min(max(low, 0.0), 1.0), min(max(high, 0.0), 1.0)


def mean_interval(values: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """95% interval of the unweighted mean of independent estimates, from their own intervals.

    The distances to the lower limits are added in quadrature, and so are those to the upper ones (MOVER: Zou and
    Donner, 2008), so that asymmetric intervals stay asymmetric and the mean's never leaves [0, 1]. It covers the
    sampling of images alone: the choice of the tasks themselves is taken as given.
    """
    below = math.sqrt(sum((value - low) ** 2 for value, (low, _) in zip(values, intervals, strict=True)))
    above = math.sqrt(sum((high - value) ** 2 for value, (_, high) in zip(values, intervals, strict=True)))
    mean = sum(values) / len(values)
    return mean - below / len(values), mean + above / len(values)
