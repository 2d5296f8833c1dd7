"""95% intervals: Wilson's for proportions, the bootstrap over images for everything else."""

import math
from collections.abc import Callable

import numpy as np

from focalclip.evaluation.metrics import Floats

Z95 = 1.959963984540054  # 97.5% point of the standard normal distribution
BOOTSTRAP_DRAWS = 1000


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion (Wilson, 1927): honest also near 0, near 1 and for small n."""
    p, z2 = correct / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    statistic: Callable[[Floats], Floats], n: int, draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> tuple[float, float]:
    """95% percentile bootstrap over n images, freed of the bootstrap's own bias.

    Resampling repeats images, and repeats raise the 11-point mAP of weak scores: the draws are shifted so that their
    mean is the value itself.

    Args:
        statistic: takes weights (draws, n), how often each image was drawn, and gives (draws,).
        n: number of images.
        draws: number of resamples.
        seed: of the resampling; the same seed gives the same interval.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, min(draws, 2_000_000 // n))  # bounds one block to about 16 MB per array
    blocks = []
    for start in range(0, draws, rows):
        picks = rng.integers(n, size=(min(rows, draws - start), n))
        blocks.append(statistic(np.stack([np.bincount(row, minlength=n) for row in picks]).astype(np.float64)))
    values = np.concatenate(blocks)
    shifted = values - np.nanmean(values) + statistic(np.ones((1, n)))
    low, high = np.clip(np.nanpercentile(shifted, [2.5, 97.5]), 0, 1)
    return float(low), float(high)
