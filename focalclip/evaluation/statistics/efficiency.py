"""ELEVATER's parameter efficiency: a score that trainable parameters cost something."""

import math

AVERAGE_CLASSES = 57.55  # 1,151 classes of the 20 data sets / 20


def pe_score(score: float, trainable_parameters: float) -> float:
    """Performance-efficiency score of ELEVATER (Li et al., 2022): score x exp(-log10(P / 10^8 + 1)).

    Args:
        score: in [0, 1].
        trainable_parameters: P, 0 for zero-shot, whose PE score is the score.
    """
    return score * math.exp(-math.log10(trainable_parameters / 1e8 + 1))


def average_head(width: int) -> int:
    """Parameters of a linear head on features of this width, without bias, averaged over the 20 data sets."""
    return round(width * AVERAGE_CLASSES)
