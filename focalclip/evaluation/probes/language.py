"""The language-initialised head of ELEVATER for a convex probe.

ELEVATER starts its linear head from the zero-shot text classifier, with bias 0, and stops after some epochs of SGD;
what is left of the start then depends on rate and epochs. A convex problem has one solution wherever one starts, so
here the text classifier is the point that the penalty pulls towards (see ``logistic``): an infinite strength is the
zero-shot classifier, a vanishing one forgets it, and held-out images choose in between.
"""

import torch
from torch import Tensor

from focalclip.evaluation.probes.linear import Head, one_hot
from focalclip.evaluation.probes.logistic import EXACT, loss_on, minimise

MAX_SCALE = 100.0  # CLIP's bound on the inverse temperature (section 2.5)


def language_head(features: Tensor, labels: Tensor, text: Tensor) -> Head:
    """The zero-shot classifier as a head: text vectors times one scale.

    The scale, in [0, 100], is the one that fits the training labels best (it is the inverse temperature, which a model
    trained elsewhere need not have at ELEVATER's 100); where the text tower is of no use it is 0, and the probe is the
    plain one. Binary regressions need one common bias as well, which a softmax over classes would not notice.

    Args:
        features: (N, D), unit length.
        labels: int64 (N,), or bool (N, C).
        text: (C, D), unit length: the zero-shot classifier.
    """
    text = text.double()
    cosines = features.double() @ text.T
    loss = loss_on(one_hot(labels, len(text)), is_binary=labels.ndim == 2)
    units = torch.stack([1 / cosines.std().clamp(min=1e-6), torch.ones(())]) / len(features) ** 0.5
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def objective() -> Tensor:
        scale, bias = parameters * units
        return loss(scale * cosines + bias)

    minimise(objective, [parameters], EXACT)
    scale, bias = (parameters * units).detach()
    return Head(scale.clamp(0, MAX_SCALE) * text, bias.expand(len(text)).clone())
