"""The search for a regularisation strength, coarse to fine, as OpenAI did for CLIP (section A.3) and ELEVATER does.

From 1e-4 to 1e4 times the variance of the features: from next to no regularisation to heads that tell little but
class means, whether a model spreads its features over the sphere or keeps them in a narrow cone. A wider search would
only give a few held-out images more ways to mislead.
"""

from collections.abc import Callable, Sequence

STEPS_PER_DECADE = 8
_WEAKEST, _STRONGEST = -4 * STEPS_PER_DECADE, 4 * STEPS_PER_DECADE
_COARSE = 2 * STEPS_PER_DECADE


def choose_strength(quality: Callable[[float], float], unit: float) -> float:
    """The strength of the best quality: every second power of ten first, then ever closer to the best.

    Of several equally good ones, as a few held-out images often find, the middle one is taken.

    Args:
        quality: of a head of that strength on held-out images; called 13 times or less.
        unit: mean squared distance of the features from their mean.
    """
    known: dict[int, float] = {}

    def best_of(places: Sequence[int]) -> int:
        for place in places:
            if place not in known:
                known[place] = quality(unit * _factor(place))
        tied = [place for place in places if known[place] == max(known[other] for other in places)]
        return tied[len(tied) // 2]

    best = best_of(range(_STRONGEST, _WEAKEST - 1, -_COARSE))  # from strong to weak, which is quickest to solve
    step = _COARSE // 2
    while step:
        best = best_of([place for place in (best + step, best, best - step) if _WEAKEST <= place <= _STRONGEST])
        step //= 2
    return unit * _factor(best)


def _factor(place: int) -> float:
    return 10.0 ** (place / STEPS_PER_DECADE)
