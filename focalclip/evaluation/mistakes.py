"""Which of a task's images are shown: the worst mistakes and an example of each common confusion, as thumbnails."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from focalclip.evaluation.data import Entry, decode
from focalclip.evaluation.predictions import SIDE, WORST, Pictures

_PAIRS = 8


def mistakes(
    predicted: NDArray[np.integer], confidence: NDArray[Any], labels: NDArray[Any], true_confidence: NDArray[Any]
) -> list[int]:
    """Rows worth a picture: the worst mistakes, then one of each of the commonest confusions.

    The worst mistake is the one whose answer scores highest above the true class (for multi-label data, above nothing).
    Where there are many pairs of true and given class, each gets one picture, so that no two look-alikes fill the page.

    Args:
        predicted: (N,).
        confidence: (N,), cosine of the answer.
        labels: (N,), or bool (N, C).
        true_confidence: (N,), cosine of the true class; empty for multi-label data.
    """
    if labels.ndim == 2:
        wrong = np.flatnonzero(~labels[np.arange(len(labels)), predicted])
        order = wrong[np.argsort(-confidence[wrong], kind="stable")]
        return _spread(order, predicted.astype(np.int64))
    wrong = np.flatnonzero(predicted != labels)
    order = wrong[np.argsort(-(confidence - true_confidence)[wrong], kind="stable")]
    pair = labels * (int(predicted.max(initial=0)) + 1) + predicted
    worst = _spread(order, pair)
    kinds, counts = np.unique(pair[wrong], return_counts=True)
    commonest = set(kinds[np.argsort(-counts, kind="stable")][:_PAIRS].tolist())
    examples = [row for row in _first(order, pair, 1) if int(pair[row]) in commonest]
    return list(dict.fromkeys([*worst, *examples]))


def thumbnails(rows: Sequence[int], entries: Sequence[Entry]) -> Pictures:
    """Read and shrink the images of some rows."""
    return Pictures(np.array(rows, dtype=np.int64), tuple(_thumbnail(entry.read()) for entry in entries))


def _spread(order: NDArray[np.integer], kind: NDArray[np.integer]) -> list[int]:
    """The first rows of ``order``, no kind oftener than needed to fill the page."""
    kinds = max(1, len(np.unique(kind[order])))
    return _first(order, kind, -(-WORST // kinds))[:WORST]


def _first(order: NDArray[np.integer], kind: NDArray[np.integer], times: int) -> list[int]:
    """The rows of ``order`` whose kind came fewer than ``times`` times before."""
    seen: dict[int, int] = {}
    kept = []
    for row in order.tolist():
        seen[int(kind[row])] = seen.get(int(kind[row]), 0) + 1
        if seen[int(kind[row])] <= times:
            kept.append(row)
    return kept


def _thumbnail(data: bytes) -> bytes:
    image = decode(data)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75, method=4)
    return buffer.getvalue()
