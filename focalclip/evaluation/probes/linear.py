"""What the linear probes share: the head, and the principal axes of the features that they are solved in."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_RANK_TOLERANCE = 1e-12  # of the largest variance; what lies below is rounding of a float64 Gram matrix


@dataclass(frozen=True)
class Head:
    """A linear classifier in float64."""

    weight: Tensor
    """(C, D)."""
    bias: Tensor
    """(C,)."""

    def __call__(self, features: Tensor) -> Tensor:
        """Scores (N, C), float64, of features (N, D)."""
        return features.double() @ self.weight.T + self.bias


@dataclass(frozen=True)
class PrincipalAxes:
    """Centred features X (N, D) turned into their own axes: one eigendecomposition, of the smaller Gram matrix.

    In these coordinates Z the Gram matrix is diagonal, so a ridge regression is one division per coefficient, whatever
    its strength, and a logistic regression is well scaled. A head that is penalised by the length of its weights never
    leaves the span of the axes, so nothing is lost where there are fewer images than features (as in big_vision's
    ``fewshot_lsr``, whose one eigendecomposition serves both cases too).
    """

    mean: Tensor
    """(D,)."""
    axes: Tensor
    """(D, R), orthonormal columns; R is the rank of the centred features."""
    variances: Tensor
    """(R,): the squared length of each column of Z."""
    coordinates: Tensor
    """Z (N, R)."""

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Axes of features (N, D) of any floating type; all results are float64."""
        features = features.double()
        mean = features.mean(dim=0)
        centred = features - mean
        is_wide = centred.shape[0] < centred.shape[1]
        variances, vectors = torch.linalg.eigh(centred @ centred.T if is_wide else centred.T @ centred)
        kept = variances > _RANK_TOLERANCE * variances[-1].clamp(min=torch.finfo(torch.float64).tiny)
        variances, vectors = variances[kept], vectors[:, kept]
        axes = centred.T @ vectors / variances.sqrt() if is_wide else vectors
        return cls(mean, axes, variances, centred @ axes)

    def head(self, weight: Tensor, bias: Tensor) -> Head:
        """The head on the features themselves, of weights (C, R) and biases (C,) on the coordinates."""
        own = weight @ self.axes.T
        return Head(own, bias - own @ self.mean)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Targets (N, C) in {0, 1}, float64, of class numbers (N,) or truth values (N, C)."""
    if labels.ndim == 2:
        return labels.double()
    return torch.nn.functional.one_hot(labels, num_classes).double()
