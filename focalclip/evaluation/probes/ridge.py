"""Ridge regression onto targets of +1 and -1, in closed form: the cheapest serious probe."""

from collections.abc import Callable

from torch import Tensor

from focalclip.evaluation.probes.linear import Head, PrincipalAxes, one_hot


def ridge(features: Tensor, labels: Tensor, num_classes: int) -> Callable[[float], Head]:
    """Prepare a ridge regression; the eigendecomposition is done once, here.

    The head minimises, for targets Y of +1 (has the label) and -1 (has it not),

        || X W' + 1 b' - Y ||^2 + strength || W ||^2

    with a free bias, which is scikit-learn's ``Ridge(alpha=strength)``.

    Args:
        features: (N, D).
        labels: int64 (N,), or bool (N, C).
        num_classes: C.

    Returns:
        A function from the strength, above 0, to the head.
    """
    space = PrincipalAxes.of(features)
    targets = 2 * one_hot(labels, num_classes) - 1
    projected = targets.T @ space.coordinates  # C, R; coordinates are centred, so the targets need not be

    def fit(strength: float) -> Head:
        return space.head(projected / (space.variances + strength), targets.mean(dim=0))

    return fit
