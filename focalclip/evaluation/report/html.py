"""A result as one self-contained page: pictures are inside it, nothing is fetched. The layout is in ``page.html``."""

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from focalclip.evaluation.calibration import BINS
from focalclip.evaluation.report.published import Cell, Row, rows_beside
from focalclip.evaluation.report.reliability import panel
from focalclip.evaluation.report.sections import section
from focalclip.evaluation.report.tables import table_rows
from focalclip.evaluation.report.text import percent, signed, some
from focalclip.evaluation.tasks import METRIC_TITLES

if TYPE_CHECKING:
    from focalclip.evaluation.report.records import Result, TaskResult

_INTERVAL_NOTE = (
    "Intervals are for the sampling of images: Wilson's for accuracy, the bootstrap over images for the other metrics;"
    " that of the mean takes the tasks as given. Two models on the same images are compared better in pairs:"
    " eval/zeroshot.py --compare A B."
)


def html_page(result: "Result") -> str:
    """The page as text; small pictures stand in it as data URIs."""
    folder = files("focalclip.evaluation.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    rows = rows_beside(result)
    panels = {name: panel(task.predictions) for name, task in result.tasks.items() if task.predictions is not None}
    return template.render(
        css=Markup((folder / "page.css").read_text(encoding="utf-8")),
        title=f"Zero-shot on {result.benchmark}: {result.model.get('source', 'a model')}",
        subtitle=f"protocol {result.protocol}, {_tasks(len(result.tasks))} evaluated in {_duration(result.seconds)}",
        score=_score(result),
        expected=result.expected,
        facts=_facts(result),
        dots=_dots(result, rows),
        legend=[{"name": row.name, "data": row.data, "shape": i} for i, row in enumerate(rows)],
        starred=not all(task.beats_guessing for task in result.tasks.values()),
        interval_note=_INTERVAL_NOTE,
        table=_table(result),
        problems=_problems(result),
        panels=[{"name": name} | drawn for name, drawn in panels.items() if drawn],
        bins=BINS,
        own_scale=_own_scale(result),
        sections=[section(name, task) for name, task in result.tasks.items()],
        published=_published(result, rows),
        sources=_sources(rows),
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


def _facts(result: "Result") -> list[tuple[str, str]]:
    """What is known of model and machine, in words."""
    model, hardware = result.model, result.hardware
    images = sum(task.n for task in result.tasks.values())
    seconds = sum(task.n / task.images_per_second for task in result.tasks.values())
    facts = {
        "weights (SHA-256)": str(model.get("sha256", ""))[:16],
        "precision, device": ", ".join(str(model[key]) for key in ("precision", "device") if key in model),
        "parameters": _sides(model, "parameters"),
        "multiply-adds": _sides(model, "multiply_adds"),
        "image size": f"{model['image_size']} px" if "image_size" in model else "",
        "learned scale": f"{model['logit_scale']:.1f}" if "logit_scale" in model else "",
        "machine": str(hardware.get("gpu", hardware.get("processor", ""))),
        "cores": str(hardware.get("cores", "")),
        "peak memory": f"{hardware['peak_memory_bytes'] / 2**30:.2f} GiB" if "peak_memory_bytes" in hardware else "",
        "images": f"{images:,} at {images / seconds:,.0f} images/s" if seconds else "",
        "software": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
    }
    return [(name, value) for name, value in facts.items() if value]


def _sides(model: dict[str, Any], what: str) -> str:
    """``12.3 M (image 4.5 M, text 7.8 M)``, of what is known."""
    sides = [f"{side} {_size(model[f'{side}_{what}'])}" for side in ("image", "text") if f"{side}_{what}" in model]
    whole = _size(model[what]) if what in model else ""
    return f"{whole} ({', '.join(sides)})" if whole and sides else whole or ", ".join(sides)


def _size(number: float) -> str:
    """Three digits and the thousands in a letter."""
    power = next((i for i, letter in enumerate("kMG") if number < 999.5 * 1000 ** (i + 1)), 2) if number >= 1000 else -1
    return f"{number:.0f}" if power < 0 else f"{number / 1000 ** (power + 1):.3g} {'kMG'[power]}"


def _dots(result: "Result", rows: list[Row]) -> list[dict[str, Any]]:
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
    return first, second, f"{task.images_per_second:,.0f}"


def _problems(result: "Result") -> list[dict[str, Any]]:
    tasks = result.tasks.items()
    listings = {
        "Data that differs from the protocol": {n: "; ".join(t.differences) for n, t in tasks if t.differences},
        "Damaged images, left out": {n: some(t.broken, t.n + len(t.broken)) for n, t in tasks if t.broken},
        "Failed: the data is not right": result.failed,
        "Missing: not evaluated for lack of data": result.missing,
    }
    return [{"title": title, "rows": list(rows.items())} for title, rows in listings.items() if rows]


def _own_scale(result: "Result") -> str:
    scales = [task.calibration["own_scale"] for task in result.tasks.values() if "own_scale" in task.calibration]
    return f"{scales[0]:.1f}" if scales else ""


def _published(result: "Result", rows: list[Row]) -> list[dict[str, Any]]:
    """What the plot's marks are, with why they may not be the same measurement."""
    if not rows:
        return []
    marks = {source["title"]: source["mark"] for source in _sources(rows)}

    def line(name: str, cells: list[Cell | None], mean: bool) -> dict[str, Any]:
        remarks = dict.fromkeys(cell.remark for cell in cells if cell and cell.remark)
        shown = [
            cell and {"value": percent(cell.value), "source": cell.source.title, "mark": marks[cell.source.title]}
            for cell in cells
        ]
        return {"name": name, "cells": shown, "remark": "; ".join(remarks), "mean": mean}

    lines = [line(name, [row.tasks.get(name) for row in rows], False) for name in result.tasks]
    return [*lines, line("mean of 20", [row.mean for row in rows], True)]


def _sources(rows: list[Row]) -> list[dict[str, Any]]:
    """The sources in order of first use, lettered."""
    cells = [cell for row in rows for cell in [*row.tasks.values(), row.mean]]
    unique = list({cell.source.title: cell.source for cell in cells}.values())
    return [
        {"mark": chr(ord("a") + i), "title": source.title, "url": source.url, "trust": source.trust}
        for i, source in enumerate(unique)
    ]


def _provenance(result: "Result") -> str:
    metrics = dict.fromkeys(METRIC_TITLES[task.metric] for task in result.tasks.values())
    how = f"Metrics: {', '.join(metrics)}. " if metrics else ""
    return (
        f"{how}Written by focalclip {result.versions.get('focalclip', '')}; the same numbers in full are in the JSON."
    )
