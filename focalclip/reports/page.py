"""A result as one self-contained page: pictures are inside it, nothing is fetched. The layout is in ``page.html``."""

import base64
import io
import math
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from focalclip.base.terminal import percent, signed, some
from focalclip.evaluation.metrics import METRICS
from focalclip.evaluation.metrics.calibration import BINS
from focalclip.evaluation.predictions import SIDE, WORST, Predictions
from focalclip.reports.charts import dots, panel, published_table, sources
from focalclip.reports.classes import class_numbers, confusions
from focalclip.reports.published import models_beside
from focalclip.reports.tables import table_rows

if TYPE_CHECKING:
    from focalclip.evaluation.result import Result, TaskResult

_PAIRS = 8  # confusions that are shown

_INTERVAL_NOTE = (
    "Intervals are for the sampling of images: Wilson's for accuracy, the bootstrap over images for the other metrics;"
    " that of the mean takes the tasks as given. Two models on the same images are compared better in pairs:"
    " eval/zeroshot.py --compare A B."
)


def html_page(result: "Result") -> str:
    """The page as text; small pictures are embedded as data URIs."""
    folder = files("focalclip.reports")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    models = models_beside(result)
    panels = {name: panel(task.predictions) for name, task in result.tasks.items() if task.predictions is not None}
    return template.render(
        css=Markup((folder / "page.css").read_text(encoding="utf-8")),
        title=f"Zero-shot on {result.benchmark}: {result.model.get('source', 'a model')}",
        subtitle=f"protocol {result.protocol}, {_tasks(len(result.tasks))} evaluated in {_duration(result.seconds)}",
        score=_score(result),
        expected=result.expected,
        facts=_facts(result),
        dots=dots(result, models),
        legend=[{"name": model.label, "data": model.data, "shape": i} for i, model in enumerate(models)],
        starred=not all(task.beats_guessing for task in result.tasks.values()),
        interval_note=_INTERVAL_NOTE,
        table=_table(result),
        problems=_problems(result),
        panels=[{"name": name} | drawn for name, drawn in panels.items() if drawn],
        bins=BINS,
        own_scale=_own_scale(result),
        sections=[_section(name, task) for name, task in result.tasks.items()],
        published=published_table(result, models),
        sources=sources(models),
        provenance=_provenance(result),
        hashes=[(name, task.version, task.task_sha256, task.folder) for name, task in result.tasks.items()],
    )


def _tasks(count: int) -> str:
    return f"{count} task" + ("" if count == 1 else "s")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _score(result: "Result") -> dict[str, Any] | None:
    score, interval, above = result.score, result.score_interval, result.score_above_chance
    if score is None or interval is None or above is None:
        return None
    return {
        "value": percent(score),
        "interval": f"{percent(interval[0])} to {percent(interval[1])}",
        "above": signed(above),
        "of": f"mean of {len(result.scored)} of {result.expected} tasks",
        "partial": len(result.scored) < result.expected,
    }


def _table(result: "Result") -> dict[str, Any] | None:
    if not result.tasks:
        return None
    head, *body = table_rows(result)
    extra = ("top-5 %", "ECE %", "images/s")
    more = [_more(task) for task in result.tasks.values() if task.in_score]
    if result.score is not None:
        more.append(("", "", ""))
    more += [_more(task) for task in result.tasks.values() if not task.in_score]
    kinds = ["mean" if row[0].startswith("mean of ") else "beside" if "(beside" in row[0] else "task" for row in body]
    rows = [{"kind": kind, "cells": row + end} for kind, row, end in zip(kinds, body, more, strict=True)]
    return {"head": head + extra, "rows": rows, "left": (0, 1)}


def _more(task: "TaskResult") -> tuple[str, str, str]:
    known = task.extras | task.calibration
    first, second = (percent(known[key]) if key in known else "" for key in ("top5", "ece"))
    return first, second, f"{task.images_per_second:,.0f}" if task.images_per_second else "cached"


def _problems(result: "Result") -> list[dict[str, Any]]:
    tasks = result.tasks.items()
    listings = {
        "Data that differs from the protocol": {n: "; ".join(t.differences) for n, t in tasks if t.differences},
        "Names that may have changed places": {n: t.label_warning for n, t in tasks if t.label_warning},
        "Damaged images, left out": {n: some(t.broken, t.n + len(t.broken)) for n, t in tasks if t.broken},
        "Failed: the data is not right": result.failed,
        "Missing: not evaluated for lack of data": result.missing,
    }
    return [{"title": title, "rows": list(rows.items())} for title, rows in listings.items() if rows]


def _provenance(result: "Result") -> str:
    metrics = dict.fromkeys(METRICS[task.metric].title for task in result.tasks.values())
    how = f"Metrics: {', '.join(metrics)}. " if metrics else ""
    return (
        f"{how}Written by focalclip {result.versions.get('focalclip', '')}; the same numbers in full are in the JSON."
    )


def _facts(result: "Result") -> list[tuple[str, str]]:
    """Names and values; what the result does not know is left out."""
    model: dict[str, Any] = {name: value for name, value in result.model.items() if value is not None}
    if "parameters" in model and "image_parameters" in model:
        model["text_parameters"] = model["parameters"] - model["image_parameters"]
    lines = {
        "weights (SHA-256)": str(model.get("sha256", ""))[:16],
        "precision, device": ", ".join(str(model[key]) for key in ("precision", "device") if key in model),
        "parameters": _sides(model, "parameters"),
        "multiply-adds": _sides(model, "multiply_adds"),
        "learned scale": _own_scale(result),
        "machine": _machine(model),
        "peak memory": _bytes(model.get("peak_memory")),
        "peak GPU memory": _bytes(model.get("peak_gpu_memory")),
        "images": _images(result),
        "software": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
    }
    return [(name, value) for name, value in lines.items() if value]


def _own_scale(result: "Result") -> str:
    """The scale that the model itself multiplies cosines with; empty where it has none."""
    scales = [task.calibration["own_scale"] for task in result.tasks.values() if "own_scale" in task.calibration]
    return f"{scales[0]:.1f}" if scales else ""


def _machine(model: dict[str, Any]) -> str:
    parts = [str(model.get("processor", ""))]
    parts += [f"{model[key]} {key}" for key in ("threads", "ranks") if model.get(key, 1) > 1]
    return ", ".join(part for part in parts if part)


def _bytes(number: int | None) -> str:
    return "" if number is None else f"{number / 2**30:.2f} GiB"


def _images(result: "Result") -> str:
    """How many were scored, and how fast those were encoded that no cache remembered."""
    tasks = result.tasks.values()
    timed = [(task.n - task.cached_images, task.images_per_second) for task in tasks if task.images_per_second]
    seconds = sum(n / speed for n, speed in timed)
    speed = f" at {sum(n for n, _ in timed) / seconds:,.0f} images/s" if seconds else ""
    cached = sum(task.cached_images for task in tasks)
    return f"{sum(task.n for task in tasks):,}{speed}" + (f", {cached:,} from the cache" if cached else "")


def _sides(model: dict[str, Any], what: str) -> str:
    """``12.3 M (image 4.5 M, text 7.8 M)``, of what is known."""
    sides = [f"{side} {_size(model[f'{side}_{what}'])}" for side in ("image", "text") if f"{side}_{what}" in model]
    whole = _size(model[what]) if what in model else ""
    return f"{whole} ({', '.join(sides)})" if whole and sides else whole or ", ".join(sides)


def _size(number: float) -> str:
    """Three digits and the thousands in a letter."""
    power = next((i for i, letter in enumerate("kMG") if number < 999.5 * 1000 ** (i + 1)), 2) if number >= 1000 else -1
    return f"{number:.0f}" if power < 0 else f"{number / 1000 ** (power + 1):.3g} {'kMG'[power]}"


def _section(name: str, task: "TaskResult") -> dict[str, Any]:
    """The task's part of the page's context; without kept answers only its numbers."""
    p = task.predictions
    low, high = task.interval
    remarks = [*task.differences, *([task.label_warning] if task.label_warning else [])]
    remarks += [f"damaged images, left out: {some(task.broken, task.n + len(task.broken))}"] if task.broken else []
    facts = [
        f"95% interval {percent(low)} to {percent(high)}", f"chance {percent(task.chance)}%", f"{task.n:,} images",
        f"{task.classes:,} classes", f"{task.templates} prompt" + ("" if task.templates == 1 else "s"),
    ]  # fmt: skip
    return {
        "name": name,
        "anchor": f"task-{name}",
        "text": f"{METRICS[task.metric].title} {percent(task.value)}%",
        "facts": " · ".join(facts),
        "remarks": remarks,
        "kept": p is not None,
        "multilabel": p is not None and p.multilabel,
        "class_value": "average precision" if p is not None and p.multilabel else "recall",
        "worst": [] if p is None else _worst(p),
        "pairs": [] if p is None else _pairs(p),
        "classes": [] if p is None else _classes(p),
    }


def _worst(p: Predictions) -> list[dict[str, Any]]:
    """The mistakes that pictures were kept of, with the answer and its confidence."""
    shown = []
    sure = None if p.multilabel else p.probabilities()[:, 0]
    for row in p.pictures.rows[:WORST].tolist():
        answer = p.class_names[int(p.top_classes[row, 0])]
        true = (
            [p.class_names[c] for c in p.labels[row].nonzero()[0]] if p.multilabel else [p.class_names[p.labels[row]]]
        )
        caption = {"true": ", ".join(true), "said": answer, "sure": "" if sure is None else f"{100 * sure[row]:.0f}%"}
        shown.append(_image(p, row) | caption)
    return shown


def _pairs(p: Predictions) -> list[dict[str, Any]]:
    """The commonest confusions that happened more than once."""
    often = [c for c in confusions(p)[:_PAIRS] if c.count > 1]
    kept = set(p.pictures.rows.tolist())
    pairs = []
    for confusion in often:
        example = next((row for row in confusion.rows.tolist() if row in kept), None)
        pairs.append(
            {
                "true": p.class_names[confusion.true],
                "given": p.class_names[confusion.given],
                "count": f"{confusion.count:,}",
                "share": f"{100 * confusion.share:.0f}%",
                "image": None if example is None else _image(p, example),
            }
        )
    return pairs


def _classes(p: Predictions) -> list[dict[str, Any]]:
    rows = sorted(class_numbers(p), key=lambda row: (math.isnan(row.value), row.value, row.name))
    return [
        {
            "name": row.name,
            "n": f"{row.n:,}",
            "value": None if math.isnan(row.value) else percent(row.value),
            "given": f"{row.given:,}",
            "precision": "" if math.isnan(row.precision) else f"{percent(row.precision)}%",
            "confused": ", ".join(f"{p.class_names[c.given]} {100 * c.share:.0f}%" for c in row.confused),
        }
        for row in rows
    ]


def _image(p: Predictions, row: int) -> dict[str, Any]:
    """As a data URI; pictures of a few pixels are shown with their pixels."""
    data = p.pictures.of(row) or b""
    with Image.open(io.BytesIO(data)) as image:
        tiny = max(image.size) < SIDE // 2
    uri = "data:image/webp;base64," + base64.b64encode(data).decode()
    return {"uri": uri, "tiny": tiny, "alt": f"image {p.keys[row]}"}
