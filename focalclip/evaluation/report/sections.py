"""What the page shows of one task: worst mistakes, confusions, classes."""

import base64
import io
import math
from typing import TYPE_CHECKING, Any

from PIL import Image

from focalclip.evaluation.answers.per_class import class_rows, confusions
from focalclip.evaluation.answers.pictures import SIDE, WORST
from focalclip.evaluation.answers.predictions import Predictions
from focalclip.evaluation.registry.tasks import METRIC_TITLES
from focalclip.printed import percent, some

if TYPE_CHECKING:
    from focalclip.evaluation.report.records import TaskResult

_PAIRS = 8


def section(name: str, task: "TaskResult") -> dict[str, Any]:
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
        "text": f"{METRIC_TITLES[task.metric]} {percent(task.value)}%",
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
    """The mistakes that pictures were kept of, with what was said and how surely."""
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
    rows = sorted(class_rows(p), key=lambda row: (math.isnan(row.value), row.value, row.name))
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
