"""The plot of scores with published numbers in it, and reliability diagrams, as the page's template wants them."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from focalclip.base.terminal import percent
from focalclip.evaluation.metrics.calibration import Reliability, reliability
from focalclip.evaluation.predictions import Predictions
from focalclip.reports.published import SCORE, PublishedModel, PublishedNumber, PublishedSource, published

if TYPE_CHECKING:
    from focalclip.evaluation.result import Result

_LINES = ("at100", "atown")  # the first two of the predictions' scales


def dots(result: "Result", models: Sequence[PublishedModel]) -> list[dict[str, Any]]:
    """The lines of the plot: the mean, the tasks in it, those beside it."""
    lines = []
    if result.score is not None and result.score_interval is not None:
        whole = len(result.scored) == result.expected  # the published means are of all tasks
        marks = _marks(models, SCORE) if whole else []
        name = f"mean of {len(result.scored)} of {result.expected}"
        lines.append(_dot(name, result.score, result.score_interval, None, marks) | {"mean": True, "anchor": ""})
    for name, task in sorted(result.tasks.items(), key=lambda item: not item[1].in_score):
        label = name if task.in_score else f"{name} (beside the mean)"
        star = "" if task.beats_guessing else " *"
        line = _dot(label, task.value, task.interval, task.chance, _marks(models, name))
        line |= {"mean": False, "anchor": f"task-{name}"}
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


def _marks(models: Sequence[PublishedModel], task: str) -> list[dict[str, Any]]:
    """What was published for a task; each model has its own marker."""
    marks = []
    for shape, model in enumerate(models):
        if number := model.on_page().get(task):
            source = published().source_of(model, number)
            text = f"{model.label}: {_text(number)}%, {source.title}" + (f"; {number.remark}" if number.remark else "")
            hollow = source.trust != "read"
            marks.append({"shape": shape, "x": round(number.value, 2), "hollow": hollow, "text": text})
    return marks


def published_table(result: "Result", models: Sequence[PublishedModel]) -> list[dict[str, Any]]:
    """What the plot's marks are, with why they may not be the same measurement."""
    if not models:
        return []
    letters = {source["title"]: source["mark"] for source in sources(models)}

    def line(name: str, task: str) -> dict[str, Any]:
        cells, remarks = [], []
        for model in models:
            number = model.on_page().get(task)
            title = published().source_of(model, number).title if number else ""
            cells.append(number and {"value": _text(number), "source": title, "mark": letters[title]})
            remarks += [number.remark] if number and number.remark else []
        return {"name": name, "cells": cells, "remark": "; ".join(dict.fromkeys(remarks)), "mean": task == SCORE}

    return [*(line(name, name) for name in result.tasks), line("mean of 20", SCORE)]


def sources(models: Sequence[PublishedModel]) -> list[dict[str, Any]]:
    """The sources of what is shown, in order of first use, lettered."""
    found: dict[str, PublishedSource] = {}
    for model in models:
        for number in model.on_page().values():
            source = published().source_of(model, number)
            found.setdefault(source.title, source)
    return [
        {"mark": chr(ord("a") + i), "title": source.title, "url": source.url, "trust": source.trust}
        for i, source in enumerate(found.values())
    ]


def _text(number: PublishedNumber) -> str:
    return percent(number.value / 100)


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
