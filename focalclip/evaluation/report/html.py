"""A result as one self-contained page: pictures are inside it, nothing is fetched. The layout is in ``page.html``."""

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from focalclip.evaluation.registry.tasks import METRIC_TITLES
from focalclip.evaluation.report.dots import dots, published_table, sources
from focalclip.evaluation.report.facts import facts, own_scale
from focalclip.evaluation.report.published import rows_beside
from focalclip.evaluation.report.reliability import panel
from focalclip.evaluation.report.sections import section
from focalclip.evaluation.report.tables import table_rows
from focalclip.evaluation.statistics.calibration import BINS
from focalclip.printed import percent, signed, some

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
        facts=facts(result),
        dots=dots(result, rows),
        legend=[{"name": row.name, "data": row.data, "shape": i} for i, row in enumerate(rows)],
        starred=not all(task.beats_guessing for task in result.tasks.values()),
        interval_note=_INTERVAL_NOTE,
        table=_table(result),
        problems=_problems(result),
        panels=[{"name": name} | drawn for name, drawn in panels.items() if drawn],
        bins=BINS,
        own_scale=own_scale(result),
        sections=[section(name, task) for name, task in result.tasks.items()],
        published=published_table(result, rows),
        sources=sources(rows),
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
    metrics = dict.fromkeys(METRIC_TITLES[task.metric] for task in result.tasks.values())
    how = f"Metrics: {', '.join(metrics)}. " if metrics else ""
    return (
        f"{how}Written by focalclip {result.versions.get('focalclip', '')}; the same numbers in full are in the JSON."
    )
