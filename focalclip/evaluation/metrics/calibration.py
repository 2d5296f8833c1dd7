"""Calibration: of the answers given with 70% confidence, 70% should be right.

Zero-shot probabilities are softmax(scale x cosine). ELEVATER fixes the scale at 100, a model learns its own, and a
third can be fitted to the answers: the ranking of the classes is the same with all of them, the confidence is not.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from focalclip.evaluation.metrics.definitions import Floats

if TYPE_CHECKING:  # reading a result does without torch
    from torch import Tensor

BINS = 15  # Guo et al., On Calibration of Modern Neural Networks (2017), section 3

_MAX_SCALE = 1e4

FIT_IMAGES = 5000  # plenty for one number


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy, bin by bin; empty bins are left out."""

    confidence: Floats
    """Mean confidence of each bin."""
    accuracy: Floats
    """Share of right answers in each bin."""
    count: NDArray[np.int64]

    @property
    def ece(self) -> float:
        """Expected calibration error: mean gap between the two, weighted by count (Guo et al. 2017, eq. 3).

        It is biased upwards for few images: even perfect probabilities leave a gap in a bin of ten.
        """
        return float((self.count * np.abs(self.accuracy - self.confidence)).sum() / self.count.sum())


def reliability(
    confidence: Floats, correct: NDArray[np.bool_], bins: int = BINS, equal_mass: bool = False
) -> Reliability:
    """Sort answers into bins of confidence.

    Args:
        confidence: (N,), the probability of each answer, in [0, 1].
        correct: (N,), whether it was right.
        bins: number of bins.
        equal_mass: bins of equally many answers, as equal as can be; else of equal width, ``((m - 1) / M, m / M]``.
    """
    if equal_mass:
        order = np.argsort(confidence, kind="stable")
        member = np.empty(len(order), dtype=np.int64)
        member[order] = np.arange(len(order)) * bins // len(order)
    else:
        member = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(member, minlength=bins)
    full = count > 0
    sums = (np.bincount(member, weights=x, minlength=bins)[full] for x in (confidence, correct.astype(np.float64)))
    mean_confidence, accuracy = (x / count[full] for x in sums)
    return Reliability(mean_confidence, accuracy, count[full])


def fit_scale(cosines: "Tensor", labels: NDArray[np.integer]) -> float:
    """The scale with the lowest cross-entropy of softmax(scale x cosine): temperature scaling (Guo et al. 2017, 4.2).

    Fitted on the images that it is evaluated on: it shows how much of the error one number could remove, and is no
    calibration to deploy. The loss is convex in the scale; its slope is followed to zero by bisection.

    Args:
        cosines: (N, C); of more than 5,000 images every k-th is used.
        labels: (N,).

    Returns:
        In [0.01, 10,000]; the upper end where every answer is right.
    """
    import torch

    every = -(-len(labels) // FIT_IMAGES)
    x, true = cosines[::every], torch.from_numpy(np.asarray(labels[::every], dtype=np.int64))
    target = x.gather(1, true[:, None]).mean()
    low, high = 0.01, _MAX_SCALE
    for _ in range(20):  # the ratio of the ends goes to its square root each time: 10^6 shrinks to 1 + 10^-5
        middle = (low * high) ** 0.5
        slope = (torch.softmax(middle * x, dim=1) * x).sum(dim=1).mean() - target
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(high)


def learned_scale(model: Any) -> float | None:
    """The scale that the model itself multiplies cosines with, if it has one."""
    from torch import nn

    if callable(getattr(model, "scale", None)):
        return float(model.scale().detach())  # FocalCLIP: bounded
    named = model.named_parameters() if isinstance(model, nn.Module) else ()
    # open_clip and transformers hold the logarithm under this name
    logs = [parameter for name, parameter in named if name.rpartition(".")[2] == "logit_scale"]
    return float(logs[0].detach().float().exp()) if logs else None
