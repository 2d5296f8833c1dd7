"""CLIP_benchmark's numbers beside ours."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

TOLERANCE = 1e-6
NAMES = {
    "acc1": "accuracy",
    "acc5": "top5",
    "mean_per_class_recall": "mean_per_class",
    "mean_average_precision": "map",
}
"""Its metrics of classification and ours."""
DIRECTIONS = {"image_retrieval": "text_to_image", "text_retrieval": "image_to_text"}
"""Its directions of retrieval, called by what is found, and ours."""


class Difference(NamedTuple):
    """One number of both."""

    task: str
    metric: str
    """CLIP_benchmark's name."""
    theirs: float
    ours: float | None
    """None where the result lacks it."""

    @property
    def is_equal(self) -> bool:
        """Whether they agree to :data:`TOLERANCE`."""
        return self.ours is not None and abs(self.ours - self.theirs) <= TOLERANCE


def differences(theirs: Mapping[str, Mapping[str, float]], result: Mapping[str, Any]) -> list[Difference]:
    """Every number that CLIP_benchmark gave, beside that of our result.

    Args:
        theirs: its metrics by task; not-a-number where it has none (top 5 of fewer than five classes).
        result: the JSON of ``eval/zeroshot.py`` under the protocol clip_benchmark, or of ``eval/retrieval.py``.
    """
    return [
        Difference(name, metric, value, _ours(result["tasks"].get(name), metric))
        for name, metrics in theirs.items()
        for metric, value in metrics.items()
        if not math.isnan(value)
    ]


def _ours(task: Mapping[str, Any] | None, metric: str) -> float | None:
    """Our number for its ``metric``."""
    if task is None:
        return None
    if metric in NAMES:
        return task["value"] if task["metric"] == NAMES[metric] else task.get(NAMES[metric])
    direction, _, recall = metric.partition("_recall")
    return task[DIRECTIONS[direction]][f"recall{recall}"]["value"]
