"""k nearest neighbours by cosine, each voting with exp(cosine / temperature): nothing is trained.

k = 20 and temperature 0.07 are DINO's standard (https://arxiv.org/abs/2104.14294, ``eval_knn.py``).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from focalclip.evaluation.probes.linear import one_hot
from focalclip.evaluation.statistics.products import whole_float32

NEIGHBOURS, TEMPERATURE = 20, 0.07
_BLOCK = 2**25  # similarities held at a time


def knn(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Callable[[Tensor], Tensor]:
    """A classifier by the nearest of unit vectors.

    Args:
        features: (N, D), unit length.
        labels: int64 (N,), or bool (N, C).
        num_classes: C.
        neighbours: how many vote; all where there are fewer.
        temperature: of the votes.

    Returns:
        A function from unit vectors (M, D) to the share of the vote (M, C) of each label, float64.
    """
    targets = one_hot(labels, num_classes)
    neighbours = min(neighbours, len(features))

    def votes(queries: Tensor) -> Tensor:
        cosines, nearest = (queries @ features.T).topk(neighbours)
        weights = torch.softmax(cosines.double() / temperature, dim=1)
        # one neighbour after another, because (M, k, C) does not fit into memory for a thousand classes
        return sum((weights[:, [j]] * targets[nearest[:, j]] for j in range(neighbours)), torch.zeros(()))

    @whole_float32()
    def classify(queries: Tensor) -> Tensor:
        rows = max(1, _BLOCK // max(len(features), neighbours * num_classes))
        return torch.cat([votes(block) for block in queries.split(rows)])

    return classify
