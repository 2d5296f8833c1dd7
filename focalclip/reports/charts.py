"""Scores with published numbers and reliability diagrams as the page's template wants them; the curves of a run."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from focalclip.base.errors import UserError, require
from focalclip.base.files import whole_file
from focalclip.base.terminal import percent
from focalclip.evaluation.metrics.calibration import Reliability, reliability
from focalclip.evaluation.predictions import Predictions
from focalclip.reports.published import SCORE, PublishedModel, PublishedNumber, PublishedSource, published

if TYPE_CHECKING:
    from focalclip.evaluation.result import Result

CURVES = "curves.svg"
"""In a run directory."""

_POINTS = (2000, 100)  # of the training loss at most: of the faint line, and of the means that the strong one joins

_WAYS = {"image_to_text": "#4c72b0", "text_to_image": "#c44e52"}

_STYLES = {"recall@1": "-", "recall@5": "--", "recall@10": ":"}

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


def write_curves(run_dir: Path) -> Path:
    """Draw loss over steps, and below it what was measured in between: recall of held-out pairs, zero-shot score.

    Args:
        run_dir: a run directory with ``metrics.jsonl``.

    Returns:
        ``curves.svg`` in it.

    Raises:
        UserError: if matplotlib is missing, or there is no line of training yet.
    """
    require(f"{run_dir / CURVES}", "eval", "matplotlib")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _metrics(run_dir / "metrics.jsonl")
    training = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    if not training:
        raise UserError(f"{run_dir}: no step of training is logged yet, so there are no curves to draw")
    held = [(line["step"], line["heldout"]) for line in lines if line.get("heldout")]
    means = [(line["step"], line["zeroshot"].get("score")) for line in lines if line.get("zeroshot")]
    scores = [(step, 100 * score) for step, score in means if score is not None]
    rows = 1 + bool(held or scores)
    figure = Figure(figsize=(7.5, 0.6 + 2.7 * rows), layout="constrained")
    panels: Any = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    _draw_losses(panels[0], np.array(training, dtype=float), held)
    if rows > 1:
        _draw_fractions(panels[1], held, scores)
    panels[-1].set_xlabel("step", fontsize=8)
    for panel in panels:
        panel.tick_params(labelsize=8)
        panel.grid(color="0.92", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    figure.suptitle(run_dir.resolve().name, fontsize=10)
    FigureCanvasAgg(figure)
    with rc_context({"svg.hashsalt": "focalclip"}), whole_file(run_dir / CURVES) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    return run_dir / CURVES


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; what a killed process wrote in part is none."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        found += [values] if isinstance(values, dict) and isinstance(values.get("step"), int) else []
    return found


def _draw_losses(panel: Any, training: np.ndarray, held: Sequence[tuple[int, dict[str, Any]]]) -> None:
    """Training loss, (n, 2) of step and loss, and held-out loss."""
    faint, strong = (_means(training, points) for points in _POINTS)
    panel.plot(*faint.T, color="0.75", linewidth=0.8)
    panel.plot(*strong.T, color="0.25", linewidth=1.4, label="training")
    losses = [(step, values["loss"]) for step, values in held if values["loss"] is not None]
    if losses:
        batch = held[-1][1]["loss_batch"]
        label = f"held-out\n(batches of {batch:,})"
        panel.plot(*zip(*losses, strict=True), "o-", color="#dd8452", markersize=3, linewidth=1.2, label=label)
    panel.set_ylabel("loss", fontsize=8)


def _means(points: np.ndarray, most: int) -> np.ndarray:
    """At most so many points: means of neighbours."""
    parts = np.array_split(points, min(most, len(points)))
    return np.array([part.mean(axis=0) for part in parts])


def _draw_fractions(
    panel: Any, held: Sequence[tuple[int, dict[str, Any]]], scores: Sequence[tuple[int, float]]
) -> None:
    """Recall of held-out pairs both ways, with chance, and the score of the benchmark, in percent."""
    for way, colour in _WAYS.items() if held else ():
        for name, style in _STYLES.items():
            steps, values = zip(*[(step, 100 * values[way][name]) for step, values in held], strict=True)
            marker = "o" if name == "recall@1" else ""
            label = f"{name} {way.replace('_', ' ')}"
            panel.plot(steps, values, style + marker, color=colour, markersize=3, linewidth=1.2, label=label)
    if held:
        n, chance = held[-1][1]["n"], 100 * held[-1][1]["image_to_text"]["chance@1"]
        panel.axhline(chance, color="0.6", linewidth=0.8, label=f"chance of recall@1\n({n:,} pairs: {chance:.2g}%)")
    if scores:
        panel.plot(
            *zip(*scores, strict=True), "s-", color="#55a868", markersize=3, linewidth=1.2, label="zero-shot score"
        )
    panel.set_ylabel("%", fontsize=8)
    panel.set_ylim(bottom=0)
