"""What a metric is: one record holds all that scores, probes, comparisons, files, pages and tables need of it.

The table of metrics is :data:`focalclip.evaluation.metrics.METRICS`; docs/extending.md adds one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from focalclip.base.errors import UserError
from focalclip.evaluation.metrics.definitions import Floats, accuracy, mean_per_class, softmax
from focalclip.evaluation.metrics.intervals import Interval, bootstrap_interval, wilson_interval

SCALE = 100.0  # of cosines in the softmax: ELEVATER, CLIP_benchmark and DataComp alike

TOP_K = 5

_RANDOM_DRAWS = 20


@dataclass(frozen=True)
class Answers:
    """What a classifier answered for N images of a task with C classes: all that a metric is computed from."""

    labels: NDArray[Any]
    """int64 (N,), or bool (N, C) for multi-label data."""
    num_classes: int
    predicted: NDArray[np.int64]
    """(N,), the class that the metric counts: the best of all, or of the candidates (``Metric.among_candidates``)."""
    true_rank: NDArray[np.integer]
    """(N,), rank of the true class among all, 0 for the best; empty for multi-label data."""
    scores: NDArray[np.floating]
    """(N, C), cosines or a classifier's scores; (N, 0) unless the metric reads them (``Metric.reads_scores``)."""
    ranking: str = "softmax"
    """``softmax`` or ``cosine``: which of ``rankings`` a ranking metric uses."""
    are_cosines: bool = True
    """Whether ``scores`` are cosines, which rank images directly or by their softmax; other scores rank directly."""
    best_candidate: NDArray[np.int64] | None = None
    """(N,), the best of the task's candidates; None where answers were read from a file."""
    num_candidates: int = 0
    """Classes that compete in ``best_candidate``."""

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.labels)

    @cached_property
    def rankings(self) -> dict[str, NDArray[np.floating]]:
        """What images can be ranked by, each (N, C): the softmax of 100 x cosine and the cosine, or the scores."""
        if not self.are_cosines:
            return {self.ranking: self.scores}
        cosines = self.scores.astype(np.float64)
        return {"softmax": softmax(SCALE * cosines), "cosine": cosines}

    @property
    def ranked(self) -> NDArray[np.floating]:
        """What the task ranks images by (N, C)."""
        return self.rankings[self.ranking]


Definition = Callable[[Answers, Floats | None], Floats]
"""Answers and weights (draws, N), how often each image counts, to values (draws,); None: every image once."""


@dataclass(frozen=True)
class Metric:
    """One metric: its definition, interval and chance level. Values lie in [0, 1], higher is better."""

    name: str
    """In task files and results."""
    title: str
    """In tables and on pages."""
    definition: Definition
    labels: Literal["single", "multilabel", "binary"] = "single"
    """The data it needs: one label per image, several, or one of exactly two classes."""
    reads_scores: bool = False
    """Whether it reads all N x C scores, which are then kept with the predictions; else the answers are enough."""
    among_candidates: bool = False
    """Whether only the task's candidates compete (``Task.candidates``): the classes that occur, in ELEVATER."""
    correct: Callable[[Answers], NDArray[np.bool_]] | None = None
    """For a share of images that are right: which ones (N,). Such a metric has Wilson's interval, McNemar's test in
    comparisons, and the commonest class as a baseline beside chance. None: the bootstrap over images for both."""
    chance: Callable[[Answers], float] | None = None
    """Expected value of guessing; None: the mean over random answers, or random scores for multi-label data."""
    extras: Callable[[Answers], dict[str, float]] = field(default=lambda _: {})
    """Further numbers by name that are reported beside the value."""

    def problem(self, labels: NDArray[Any]) -> str:
        """Why these labels cannot be scored; empty if they can."""
        if self.labels == "binary" and len(np.unique(labels)) != 2:
            return f"{self.name} needs images of both classes, the readable ones have only one; complete the data"
        if self.labels == "multilabel" and not labels.any():
            return f"{self.name} needs positive labels, the data has none; wrong folder?"
        return "" if len(labels) else f"{self.name} needs images, there are none; complete the data"

    def value(self, answers: Answers) -> float:
        """The metric of all images."""
        return float(self.definition(answers, None)[0])

    def interval(self, answers: Answers) -> Interval:
        """95%: Wilson's for a share of images, else the bootstrap over images."""
        if self.correct is not None:
            return wilson_interval(int(self.correct(answers).sum()), answers.n)
        return bootstrap_interval(lambda weights: self.definition(answers, weights), answers.n)

    def chance_level(self, answers: Answers) -> float:
        """Expected value of guessing on these labels."""
        if self.chance is not None:
            return self.chance(answers)
        rng = np.random.default_rng(0)
        return float(np.mean([self.value(_guesses(answers, rng)) for _ in range(_RANDOM_DRAWS)]))


@dataclass(frozen=True)
class Score:
    """A metric's value in [0, 1]."""

    value: float
    interval: Interval
    chance: float
    extras: dict[str, float] = field(default_factory=dict)
    """See ``Metric.extras``."""


def score_answers(metric: Metric, answers: Answers, chance: float | None = None) -> Score:
    """A metric with its interval and chance level.

    Args:
        metric: what to compute.
        answers: with ``best_candidate``, and with scores where the metric reads them.
        chance: the task's own chance level; None: the metric's.

    Raises:
        UserError: if the labels cannot be scored by this metric.
    """
    if problem := metric.problem(answers.labels):
        raise UserError(problem)
    level = metric.chance_level(answers) if chance is None else chance
    return Score(metric.value(answers), metric.interval(answers), level, metric.extras(answers))


def answer_extras(answers: Answers) -> dict[str, float]:
    """Accuracy, mean per class, the share of the commonest class, and top-5 accuracy where there are more classes."""
    best = answers.predicted if answers.best_candidate is None else answers.best_candidate
    extras = {
        "accuracy": float(accuracy(answers.true_rank == 0)[0]),
        "mean_per_class": float(mean_per_class(best == answers.labels, answers.labels)[0]),
        "majority": float(np.bincount(answers.labels).max() / answers.n),
    }
    if answers.num_classes > TOP_K:
        extras["top5"] = float(accuracy(answers.true_rank < TOP_K)[0])
    return extras


def _guesses(answers: Answers, rng: np.random.Generator) -> Answers:
    """Random answers (single label) or random scores (multi-label) for the same labels."""
    if answers.labels.ndim == 2:
        return replace(answers, scores=rng.random(answers.labels.shape), are_cosines=False)
    guess = rng.integers(answers.num_classes, size=answers.n)
    rank = (answers.labels - guess) % answers.num_classes  # uniform, and 0 exactly where the guess is right
    return replace(answers, predicted=guess, true_rank=rank, best_candidate=guess)
