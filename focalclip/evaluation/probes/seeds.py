"""Intervals of a mean over few seeds."""

import math
from collections.abc import Sequence
from statistics import NormalDist, stdev

# 97.5% points of Student's t for 1 to 9 degrees of freedom
_T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


def t975(degrees: int) -> float:
    """97.5% point of Student's t: a table below 10 degrees of freedom, then Abramowitz and Stegun 26.7.5."""
    if degrees <= len(_T975):
        return _T975[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees ** (i + 1) for i, term in enumerate(terms))


def half_interval(values: Sequence[float]) -> float | None:
    """Half of the 95% interval of the mean, t with n - 1 degrees of freedom; None for fewer than two values."""
    return t975(len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
