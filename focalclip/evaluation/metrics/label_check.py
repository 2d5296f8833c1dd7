"""Label-sanity probe: do the model's answers fit the class names better in another order?

Names in the wrong order have cost published evaluations whole data sets, and a low score alone does not show it. The
probe compares the answers with the best relabelling of the classes (one-to-one, the Hungarian method) and warns only
where that cannot come from a model that is merely weak:

* The relabelling is chosen on half of the images and evaluated on the other half, so that noise gains nothing.
* Classes have equal weight whatever their sizes. A model that ignores the image has then the same score under every
  relabelling, also where it always answers one class and another class is the commonest.
* A cycle of names that change places must be *recognised*: on the judging half, the lower end of the 95% interval of
  its classes' mean recall must lie half-way from chance to perfect, and above its recall as named.
* The names must be used one-to-one. Sharp features under names that mean nothing to the model (an untrained text
  tower) give each class a name at random; cycles of recognised names then come up by chance, but many names serve
  twice. How likely so many different names are by chance is an occupancy problem; it must be below ``UNLIKELY``, or,
  with too few classes for that, below ``UNLIKELY_FEW`` and all names different.

So a task with two or three classes, or one on which the model is poor, cannot be checked, and gives no warning.
Nor is one with more than ``MAX_CLASSES``: the C x C tables would take gigabytes, and the assignment hours.
"""

import math
from dataclasses import dataclass

import numpy as np

from focalclip.evaluation.metrics.intervals import Z95

UNLIKELY = 0.001

UNLIKELY_FEW = 0.1  # four classes get four different names with probability 4!/4^4 = 0.094: fewer are never judged

RECOGNISED = 0.5  # of the way from chance to perfect

MAX_CLASSES = 5000  # a C x C table is then 200 MB


@dataclass(frozen=True)
class LabelCheck:
    """What the probe found; fractions are mean recalls over the classes of the judging half."""

    as_named: float = math.nan
    relabelled: float = math.nan
    arbitrary: float = math.nan
    """Probability of at least so many different names if the model's names meant nothing."""
    moved: tuple[tuple[int, ...], ...] = ()
    """Cycles of classes whose names seem to have changed places: each class is answered with the name of the next."""
    warning: str = ""
    """One sentence that names them; empty where nothing is suspicious."""


def check_labels(answers: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> LabelCheck:
    """Compare a model's answers with the labels under the given names, and under the best other order.

    Args:
        answers: int (N,), the class with the highest score of each image.
        labels: int (N,), or bool (N, C) for multi-label data, of which the images with exactly one label are used.
        class_names: in label order, (C,).

    Returns:
        What was found; nothing (NaN) where there are more than ``MAX_CLASSES``.
    """
    if len(class_names) > MAX_CLASSES:
        return LabelCheck()
    if labels.ndim == 2:
        alone = labels.sum(axis=1) == 1
        answers, labels = answers[alone], labels[alone].argmax(axis=1)
    choosing, judging = (_confusion(answers[half], labels[half], len(class_names)) for half in _halves(labels))
    name_of = _best_order(_recalls(choosing))
    recalls = _recalls(judging)
    seen = np.flatnonzero(judging.sum(axis=1))
    distinct = len(set(recalls[seen].argmax(axis=1).tolist()))
    arbitrary = _chance_of_distinct(distinct, len(seen), len(class_names))
    moved: tuple[tuple[int, ...], ...] = ()
    if arbitrary < UNLIKELY or (arbitrary < UNLIKELY_FEW and distinct == len(seen)):
        moved = tuple(cycle for cycle in _cycles(name_of) if _is_recognised(judging, cycle, name_of))
    classes = np.arange(len(class_names))
    return LabelCheck(
        as_named=float(recalls[seen, classes[seen]].mean()) if len(seen) else 0.0,
        relabelled=float(recalls[seen, name_of[seen]].mean()) if len(seen) else 0.0,
        arbitrary=arbitrary,
        moved=moved,
        warning=_sentence(moved, name_of, recalls, class_names) if moved else "",
    )


def _halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every other image of each class, in the data's order, and the rest: bool (N,) each."""
    order = np.argsort(labels, kind="stable")
    ranked = labels[order]
    place = np.empty(len(labels), dtype=np.int64)
    place[order] = np.arange(len(labels)) - np.searchsorted(ranked, ranked)
    return place % 2 == 0, place % 2 == 1


def _confusion(answers: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Images by label and answer: int (C, C)."""
    pairs = np.bincount(labels * num_classes + answers, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def _recalls(confusion: np.ndarray) -> np.ndarray:
    """Share of each class's images that get each answer: (C, C), rows without images zero."""
    count = confusion.sum(axis=1, keepdims=True)
    return np.divide(confusion, count, out=np.zeros(confusion.shape), where=count > 0)


def _best_order(recalls: np.ndarray) -> np.ndarray:
    """The name that fits each class best if every name is given once: int (C,). Of equal orders the nearest to now."""
    from scipy.optimize import linear_sum_assignment  # not needed by any number: only by this probe

    ties = 1e-9 * np.eye(len(recalls))
    return linear_sum_assignment(recalls + ties, maximize=True)[1]


def _cycles(name_of: np.ndarray) -> list[tuple[int, ...]]:
    """The permutation's cycles of two classes and more, each from its lowest class."""
    cycles, done = [], set()
    for start in range(len(name_of)):
        cycle = []
        place = start
        while place not in done:
            done.add(place)
            cycle.append(place)
            place = int(name_of[place])
        if len(cycle) > 1:
            cycles.append(tuple(cycle))
    return cycles


def _is_recognised(judging: np.ndarray, cycle: tuple[int, ...], name_of: np.ndarray) -> bool:
    """Whether the classes of a cycle are recognised by each other's names, and not by their own."""
    rows = np.array(cycle)
    count = judging[rows].sum(axis=1)
    low, _ = _mean_recall_interval(judging[rows, name_of[rows]], count)
    _, own = _mean_recall_interval(judging[rows, rows], count)
    chance = 1 / len(judging)
    return low > own and (low - chance) / (1 - chance) >= RECOGNISED


def _mean_recall_interval(right: np.ndarray, count: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean of proportions (Agresti and Coull, 1998: two successes and two failures added to each).

    A class without images has one half plus or minus one half, so that it never helps to be sure.
    """
    share = (right + 2) / (count + 4)
    half = Z95 * math.sqrt((share * (1 - share) / (count + 4)).sum()) / len(share)
    return float(share.mean() - half), float(share.mean() + half)


def _chance_of_distinct(distinct: int, balls: int, boxes: int) -> float:
    """Probability that balls thrown at random into boxes fill at least so many of them (the occupancy distribution)."""
    filled = np.zeros(boxes + 1)  # probability of each number of filled boxes so far
    filled[0] = 1.0
    numbers = np.arange(boxes + 1)
    for _ in range(balls):
        filled = filled * numbers / boxes + np.roll(filled * (boxes - numbers) / boxes, 1)
    return float(min(1.0, filled[distinct:].sum()))


def _sentence(
    moved: tuple[tuple[int, ...], ...], name_of: np.ndarray, recalls: np.ndarray, class_names: tuple[str, ...]
) -> str:
    """Which names seem to have changed places, a few by name."""
    classes = [place for cycle in moved for place in cycle]
    pairs = [f"{class_names[place]!r} looks like {class_names[name_of[place]]!r}" for place in classes[:3]]
    more = f" and {len(classes) - 3} more" if len(classes) > 3 else ""
    as_named = 100 * recalls[classes, classes].mean()
    relabelled = 100 * recalls[classes, name_of[classes]].mean()
    return (
        f"{len(classes)} class names may have changed places ({', '.join(pairs)}{more}): under them the model finds"
        f" {as_named:.1f}% of their images, in another order {relabelled:.1f}%; look at the images"
    )
