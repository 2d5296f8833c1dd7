"""Logistic regression by L-BFGS, free or drawn towards a head that is known beforehand.

One label per image makes it multinomial, several labels make it one binary regression per class. With loss l, features
x_i, labels y_i and a prior head (W0, b0) it minimises

    sum_i l(W x_i + b, y_i) + strength / 2 * || W - W0 ||^2

with a free bias. Without a prior W0 is 0: scikit-learn's ``LogisticRegression(C=1/strength)``, OpenAI's probe for CLIP.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from focalclip.evaluation.probes.linear import Head, PrincipalAxes, one_hot

EXACT, ROUGH = 1e-3, 1e-2  # tolerances; the loss, summed over images, is then about their square from its minimum
_ROUNDS, _STEPS, _HISTORY = 50, 100, 50
_LEAST_CURVATURE = 1e-8

Objective = Callable[[], Tensor]
Loss = Callable[[Tensor], Tensor]


def logistic(
    features: Tensor, labels: Tensor, num_classes: int, prior: Head | None = None, *, tolerance: float = EXACT
) -> Callable[[float], Head]:
    """Prepare a logistic regression; the eigendecomposition is done once, here.

    A class without any image is never predicted: its score is minus infinity.

    Args:
        features: (N, D).
        labels: int64 (N,), or bool (N, C).
        num_classes: C.
        prior: the head that the penalty pulls towards; None for weights of 0.
        tolerance: largest gradient left over, in coordinates in which the second derivative is about 1.

    Returns:
        A function from the strength, above 0, to the head; it starts from the head that it found last.
    """
    space = PrincipalAxes.of(features)
    targets = one_hot(labels, num_classes)
    present = targets.any(dim=0)
    targets = targets[:, present]
    known = prior or Head(torch.zeros(num_classes, features.shape[1]).double(), torch.zeros(num_classes).double())
    problem = _Problem(space, known(features)[:, present], targets, is_binary=labels.ndim == 2)
    solution = torch.zeros(targets.shape[1], len(space.variances)).double(), torch.zeros(targets.shape[1]).double()

    def fit(strength: float) -> Head:
        nonlocal solution
        solution = problem.solve(strength, *solution, tolerance)
        change = space.head(*solution)
        weight, bias = known.weight.clone(), torch.full_like(known.bias, -torch.inf)
        weight[present] += change.weight
        bias[present] = known.bias[present] + change.bias
        return Head(weight, bias)

    return fit


class _Problem:
    """The change of the prior head that fits best, on the principal axes of the features."""

    def __init__(self, space: PrincipalAxes, offsets: Tensor, targets: Tensor, *, is_binary: bool) -> None:
        self.space, self.offsets = space, offsets  # offsets (N, C): the logits of the prior head
        self.is_binary = is_binary
        self.loss = loss_on(targets, is_binary=is_binary)

    def solve(self, strength: float, weight: Tensor, bias: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        """Weights (C, R) and biases (C,) on the coordinates, from a first guess of both.

        Along an axis of variance v the second derivative is about ``strength + p (1 - p) v`` with the mean of p (1 - p)
        over the images. Each axis is scaled by its root, and anew every hundred steps: tens of steps then do, whatever
        the strength and however unlike the variances.
        """
        for _ in range(_ROUNDS):
            curvature = self._curvature(weight, bias)
            weight_scale = (strength + curvature[:, None] * self.space.variances).rsqrt()
            bias_scale = (curvature * len(self.offsets)).rsqrt()
            scaled = [(weight / weight_scale).requires_grad_(), (bias / bias_scale).requires_grad_()]

            def objective(scaled=scaled, weight_scale=weight_scale, bias_scale=bias_scale) -> Tensor:
                weight = scaled[0] * weight_scale
                return self.loss(self._logits(weight, scaled[1] * bias_scale)) + strength / 2 * weight.square().sum()

            is_there = minimise(objective, scaled, tolerance)
            weight, bias = (scaled[0] * weight_scale).detach(), (scaled[1] * bias_scale).detach()
            if is_there:
                break
        return weight, bias

    def _logits(self, weight: Tensor, bias: Tensor) -> Tensor:
        return self.offsets + self.space.coordinates @ weight.T + bias

    def _curvature(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Mean of p (1 - p) over the images (C,)."""
        logits = self._logits(weight, bias)
        p = logits.sigmoid() if self.is_binary else logits.softmax(dim=1)
        return (p * (1 - p)).mean(dim=0).clamp(min=_LEAST_CURVATURE)


def loss_on(targets: Tensor, *, is_binary: bool) -> Loss:
    """The summed loss on targets (N, C) in {0, 1} as a function of logits (N, C)."""
    if is_binary:
        return lambda logits: F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    classes = targets.argmax(dim=1)
    return lambda logits: F.cross_entropy(logits, classes, reduction="sum")


def minimise(objective: Objective, parameters: Sequence[Tensor], tolerance: float) -> bool:
    """Bring leaf tensors nearer to the minimum of a convex objective; true once no gradient exceeds the tolerance."""
    solver = torch.optim.LBFGS(
        list(parameters),
        max_iter=_STEPS,
        history_size=_HISTORY,
        tolerance_grad=tolerance,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        value = objective()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(closure)  # pyrefly: ignore
        closure()
    return all(bool((x.grad.abs() <= tolerance).all()) for x in parameters if x.grad is not None)
