"""The four probes as functions of features and labels, and the search for the strength of their regularisation.

Ridge and logistic regression are solved in float64 on the principal axes of the features. ``ridge`` and ``logistic``
return a function from the strength to a :class:`Head`, so that a search shares the eigendecomposition;
``language_head`` is the prior of ELEVATER's language-initialised probe; ``knn`` has no strength.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from focalclip.base.machine import full_float32_matmul

EXACT, ROUGH = 1e-3, 1e-2  # tolerances; the loss, summed over images, is then about their square from its minimum

MAX_SCALE = 100.0  # CLIP's bound on the scale of the logits (section 2.5)

NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO's k-NN (arXiv:2104.14294)

STEPS_PER_DECADE = 8  # resolution of the strength

_WEAKEST, _STRONGEST = -4 * STEPS_PER_DECADE, 4 * STEPS_PER_DECADE

_COARSE = 2 * STEPS_PER_DECADE

_RANK_TOLERANCE = 1e-12  # of the largest variance; below it is rounding of a float64 Gram matrix

_ROUNDS, _STEPS, _HISTORY = 50, 100, 50  # of L-BFGS: restarts, steps of each, pairs remembered

_LEAST_CURVATURE = 1e-8

_BLOCK = 2**25  # similarities that k-NN holds at a time

Objective = Callable[[], Tensor]

Loss = Callable[[Tensor], Tensor]


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
    """Centred features X (N, D) rotated to their principal axes: one eigendecomposition, of the smaller Gram matrix.

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
    return F.one_hot(labels, num_classes).double()


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


def logistic(
    features: Tensor, labels: Tensor, num_classes: int, prior: Head | None = None, *, tolerance: float = EXACT
) -> Callable[[float], Head]:
    """Prepare a logistic regression, free or regularised towards a known head; the eigendecomposition is done once.

    One label per image makes it multinomial, several labels make it one binary regression per class. With loss l,
    features x_i, labels y_i and a prior head (W0, b0) it minimises

        sum_i l(W x_i + b, y_i) + strength / 2 * || W - W0 ||^2

    with a free bias. Without a prior W0 is 0: scikit-learn's ``LogisticRegression(C=1/strength)``, OpenAI's probe for
    CLIP. A class without any image is never predicted: its score is minus infinity.

    Args:
        features: (N, D).
        labels: int64 (N,), or bool (N, C).
        num_classes: C.
        prior: the head (W0, b0); None for weights of 0.
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
        over the images. Each axis is scaled by its root, and again every hundred steps: tens of steps then do, whatever
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


def language_head(features: Tensor, labels: Tensor, text: Tensor) -> Head:
    """The zero-shot classifier as a head: text vectors times one scale.

    The scale, in [0, 100], is the one that fits the training labels best (it is the inverse temperature, which a model
    trained elsewhere need not have at ELEVATER's 100); where the text classifier does not help it is 0, and the
    probe is the plain one. Binary regressions need one common bias as well, which a softmax over classes
    would not notice.

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

    @full_float32_matmul()
    def classify(queries: Tensor) -> Tensor:
        rows = max(1, _BLOCK // max(len(features), neighbours * num_classes))
        return torch.cat([votes(block) for block in queries.split(rows)])

    return classify


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
