"""Two models on the same images: tests and intervals of their difference.

Images that both get right, or both wrong, carry no information about the difference. A paired comparison leaves them
out and so detects differences that two separate intervals hide.
"""

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from focalclip.evaluation.metrics.definitions import Floats
from focalclip.evaluation.metrics.intervals import bootstrap_draws

PAIRED_DRAWS = 2000  # the smallest p-value of the bootstrap is then 0.001


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test (McNemar, 1947): a fair coin for every image that only one gets right.

    Args:
        only_a: images that only the first model gets right.
        only_b: images that only the second gets right.
    """
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def paired_draws(a: Callable[[Floats], Floats], b: Callable[[Floats], Floats], n: int, name: str) -> Floats:
    """Bootstrap draws of ``b - a``, both on the same resampled images.

    Args:
        a: statistic of the first model: weights (draws, n) to (draws,).
        b: the same of the second.
        n: number of images.
        name: of the task. Each has its own draws: common draws would correlate tasks of equal size, and the
            interval of their mean would be too wide or too narrow.

    Returns:
        (PAIRED_DRAWS,).
    """
    return bootstrap_draws(lambda w: b(w) - a(w), n, PAIRED_DRAWS, seed=(0, zlib.crc32(name.encode())))


def bootstrap_p(draws: Floats) -> float:
    """Two-sided p-value of "no difference": twice the share of draws on the opposite side of zero, never quite 0."""
    draws = draws[~np.isnan(draws)]
    far = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (far + 1) / (len(draws) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for how many there are (Holm, 1979): the chance of any false alarm among them is kept."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = running
    return adjusted
