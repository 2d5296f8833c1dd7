"""Metrics, intervals, paired tests and calibration; nothing here knows a model or a file."""

import difflib
from importlib import import_module

from focalclip.evaluation.metrics.metric import Metric

_MODULES = (  # each has a tuple METRICS
    "standard",
)

METRICS: dict[str, Metric] = {
    metric.name: metric for module in _MODULES for metric in import_module(f"{__name__}.{module}").METRICS
}
"""Every metric by its name in task files and results."""


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ValueError: if there is none, naming the nearest.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(METRICS)}"
        raise ValueError(f"there is no metric {name!r}; {hint}")
    return METRICS[name]


__all__ = ["METRICS", "Metric", "find_metric"]
