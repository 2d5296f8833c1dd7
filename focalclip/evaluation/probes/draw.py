"""Which training images a probe sees: k per class, and the part of them that the strength is chosen on.

Both draws shuffle with Python's ``random.Random(seed)`` and walk once, as the ELEVATER toolkit's data library does
(microsoft/vision-datasets, ``sample_few_shot_subset``), so that equal training lists give equal subsets. Unlike the
toolkit, which holds out the first images of each class, the held-out part is drawn at random too.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

HELD_OUT = 5  # one image in five of each class, rounded up: ELEVATER's 20%


class HoldOut(NamedTuple):
    """Indices of the images that heads are fitted on, and of those that the strength is chosen on; each int64."""

    fit: np.ndarray
    held_out: np.ndarray


def choose_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """A subset with ``shots`` images of each class; a class with fewer gives what it has.

    An image with several labels is kept while its rarest label has fewer than ``shots`` images and it upsets no
    balance: its rarest label has at most half of ``shots``, or its commonest at most one and a half times as many.
    Of images without any label ``shots`` are kept.

    Args:
        labels: int64 (N,), or bool (N, C).
        shots: images per class.
        seed: of the shuffle.

    Returns:
        int64 indices, ascending.
    """
    counts = np.zeros(_num_classes(labels) + 1, dtype=np.int64)  # the last one counts images without a label
    kept = []
    for i, own in _shuffled(labels, seed):
        rarest, commonest = counts[own].min(), counts[own].max()
        if rarest < shots and (rarest <= shots / 2 or commonest <= 1.5 * shots):
            kept.append(i)
            counts[own] += 1
    return np.sort(np.array(kept, dtype=np.int64))


def hold_out(labels: np.ndarray, seed: int) -> HoldOut:
    """Divide images: a fifth of each class, rounded up, is held out; a class's last image never is.

    An image with several labels is held out where one of them still lacks some.

    Args:
        labels: int64 (N,), or bool (N, C).
        seed: of the shuffle.
    """
    images = list(_shuffled(labels, seed))
    total = np.zeros(_num_classes(labels) + 1, dtype=np.int64)
    for _, own in images:
        total[own] += 1
    quota, held = -(-total // HELD_OUT), np.zeros_like(total)
    is_held = np.zeros(len(labels), dtype=bool)
    for i, own in images:
        if (held[own] < quota[own]).any() and (held[own] + 1 < total[own]).all():
            is_held[i] = True
            held[own] += 1
    return HoldOut(np.flatnonzero(~is_held), np.flatnonzero(is_held))


def _shuffled(labels: np.ndarray, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Index and labels of each image in random order; C stands for "no label"."""
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    none = np.array([_num_classes(labels)])
    for i in order:
        own = np.flatnonzero(labels[i]) if labels.ndim == 2 else labels[i : i + 1]
        yield i, own if len(own) else none


def _num_classes(labels: np.ndarray) -> int:
    return labels.shape[1] if labels.ndim == 2 else int(labels.max(initial=0)) + 1
