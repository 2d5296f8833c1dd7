"""The dot plot and the published numbers in it, as the page's template wants them."""

import math
from typing import TYPE_CHECKING, Any

from focalclip.base.terminal import percent
from focalclip.evaluation.metrics.calibration import Reliability, reliability
from focalclip.evaluation.predictions import Predictions
from focalclip.reports.published import Cell, Row

if TYPE_CHECKING:
    from focalclip.evaluation.result import Result


def dots(result: "Result", rows: list[Row]) -> list[dict[str, Any]]:
    """The lines of the plot: the mean, the tasks in it, those beside it."""
    lines = []
    if result.score is not None and result.score_interval is not None:
        whole = len(result.scored) == result.expected  # the published means are of all tasks
        marks = [_mark(i, row, row.mean) for i, row in enumerate(rows) if whole]
        name = f"mean of {len(result.scored)} of {result.expected}"
        lines.append(_dot(name, result.score, result.score_interval, None, marks) | {"mean": True, "anchor": ""})
    for name, task in sorted(result.tasks.items(), key=lambda item: not item[1].in_score):
        marks = [_mark(i, row, row.tasks[name]) for i, row in enumerate(rows) if name in row.tasks]
        label = name if task.in_score else f"{name} (beside the mean)"
        star = "" if task.beats_guessing else " *"
        line = _dot(label, task.value, task.interval, task.chance, marks) | {"mean": False, "anchor": f"task-{name}"}
        lines.append(line | {"text_short": percent(task.value) + "%" + star})
    return lines


def _dot(
    name: str, value: float, interval: tuple[float, float], chance: float | None, marks: list[dict[str, Any]]
) -> dict[str, Any]:
    low, high = interval
    return {
        "name": name,
        "value": round(100 * value, 2),
        "low": round(100 * low, 2),
        "width": round(100 * (high - low), 2),
        "chance": None if chance is None else round(100 * chance, 2),
        "chance_text": "" if chance is None else f"{percent(chance)}%",
        "text": f"{percent(value)}% (95% interval {percent(low)} to {percent(high)})",
        "text_short": f"{percent(value)}%",
        "published": marks,
    }


def _mark(shape: int, row: Row, cell: Cell) -> dict[str, Any]:
    text = f"{row.name}: {percent(cell.value)}%, {cell.source.title}" + (f"; {cell.remark}" if cell.remark else "")
    return {"shape": shape, "x": round(100 * cell.value, 2), "hollow": cell.source.trust != "read", "text": text}


def published_table(result: "Result", rows: list[Row]) -> list[dict[str, Any]]:
    """What the plot's marks are, with why they may not be the same measurement."""
    if not rows:
        return []
    marks = {source["title"]: source["mark"] for source in sources(rows)}

    def line(name: str, cells: list[Cell | None], mean: bool) -> dict[str, Any]:
        remarks = dict.fromkeys(cell.remark for cell in cells if cell and cell.remark)
        shown = [
            cell and {"value": percent(cell.value), "source": cell.source.title, "mark": marks[cell.source.title]}
            for cell in cells
        ]
        return {"name": name, "cells": shown, "remark": "; ".join(remarks), "mean": mean}

    lines = [line(name, [row.tasks.get(name) for row in rows], False) for name in result.tasks]
    return [*lines, line("mean of 20", [row.mean for row in rows], True)]


def sources(rows: list[Row]) -> list[dict[str, Any]]:
    """The sources in order of first use, lettered."""
    cells = [cell for row in rows for cell in [*row.tasks.values(), row.mean]]
    unique = list({cell.source.title: cell.source for cell in cells}.values())
    return [
        {"mark": chr(ord("a") + i), "title": source.title, "url": source.url, "trust": source.trust}
        for i, source in enumerate(unique)
    ]


_LINES = ("at100", "atown")  # the first two of the predictions' scales


def panel(predictions: Predictions) -> dict[str, Any]:
    """Lines at scale 100 and at the model's own, and the errors in words; empty for multi-label data."""
    if predictions.multilabel:
        return {}
    correct = predictions.top_correct()
    lines, texts = [], []
    for i, scale in enumerate(predictions.scales):
        if math.isnan(scale):
            continue
        bins = reliability(predictions.probabilities(i)[:, 0], correct)
        if i < len(_LINES):
            lines.append(_line(_LINES[i], bins))
        name = "scale" if i < len(_LINES) else "fitted scale"
        texts.append(f"{name} {scale:.3g}: ECE {percent(bins.ece)}%")
    return {"lines": lines, "texts": texts}


def _line(kind: str, bins: Reliability) -> dict[str, Any]:
    x, y = 100 * bins.confidence, 100 - 100 * bins.accuracy
    share = bins.count / bins.count.sum()
    dots = [
        {
            "x": f"{x[i]:.1f}",
            "y": f"{y[i]:.1f}",
            "r": f"{1.3 + 4.2 * math.sqrt(share[i]):.1f}",
            "text": f"{bins.count[i]:,} images: confidence {x[i]:.0f}%, right {100 - y[i]:.0f}%",
        }
        for i in range(len(x))
    ]
    return {"kind": kind, "points": " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)), "dots": dots}
