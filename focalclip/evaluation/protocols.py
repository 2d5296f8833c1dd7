"""Protocols by name: what decides a number besides the model and the images.

A task file states a task as ELEVATER has it. Another protocol changes it by rule (:class:`Protocol`) and by the task
file's exceptions for that protocol (:class:`Override`). Common to all: a class is the normalised mean of the normalised
embeddings of its prompts, images are normalised, and scores are 100 x cosine, whatever temperature the model learned.
The pixels' mean and standard deviation are the model's own under every protocol.
"""

import difflib
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from focalclip.base.errors import UserError
from focalclip.base.strict import Strict
from focalclip.evaluation.shipped_names import shipped_list

if TYPE_CHECKING:
    from focalclip.evaluation.task import Task

SCALE = 100.0  # ELEVATER, CLIP_benchmark and DataComp alike; it matters to the softmax alone

Metric = Literal["accuracy", "mean_per_class", "map_11point", "map_11point_voc", "map", "roc_auc", "macro_f1"]

Scores = Literal["softmax", "cosine"]

Resize = Literal["model", "squash", "resize256_crop224"]

Candidates = Literal["occurring", "all"]

DataSource = Literal["elevater", "wds"]


class Override(Strict):
    """What one protocol changes in one task."""

    resize: Resize | None = None
    names: tuple[str, ...] | None = None
    """Class names in label order, or a :func:`~focalclip.evaluation.shipped_names.shipped_list`."""
    respelt: dict[str, str] = Field(default_factory=dict)
    """Names that are written otherwise: the task's spelling to the protocol's."""
    templates: tuple[str, ...] | None = None
    note: str | None = None
    """Where the protocol has no rule for the task: what is done."""

    @field_validator("names", "templates", mode="before")
    @classmethod
    def _look_up(cls, value: Any, info: Any) -> Any:
        return shipped_list(info.field_name, value) if isinstance(value, str) else value


class Protocol(Strict):
    """One way of measuring, by rule."""

    name: str
    source: str
    """The code that defines it."""
    follows: str | None = None
    """Another protocol, whose exceptions hold here too."""
    metrics: dict[Metric, Metric] = Field(default_factory=dict)
    """Metrics that take the place of ELEVATER's."""
    scores: Scores | None = None
    """What ranks the images of multi-label data; null: as the task has it."""
    resize: Resize | None = None
    """Null: as the task has it."""
    candidates: Candidates | None = None
    """Null: as the task has it."""
    data: DataSource | None = None
    """Whose images it is defined on; null: as the task has it."""

    def apply(self, task: "Task") -> "Task":
        """The task with this protocol's metric, scores, resize, names and templates.

        Raises:
            UserError: if the task file renames a class that the task does not have.
        """
        rule: dict[str, Any] = {"metric": self.metrics.get(task.metric, task.metric)}
        rule |= {name: value for name in ("scores", "resize", "candidates", "data") if (value := getattr(self, name))}
        for protocol in (self.follows, self.name):
            exception = task.protocols.get(protocol or "")
            if exception is None:
                continue
            rule |= {name: value for name in ("resize", "names", "templates") if (value := getattr(exception, name))}
            rule["names"] = _respell(task, rule.get("names", task.names), exception.respelt)
            rule["note"] = exception.note or rule.get("note")
        return task.model_copy(update=rule)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="elevater", source="Elevater_Toolkit_IC and vision-evaluation (metrics)"),
        Protocol(
            name="clip_benchmark",
            source="CLIP_benchmark 1.6.2",
            metrics={"map_11point": "map"},
            scores="cosine",
            resize="model",
            candidates="all",
            data="wds",
        ),
        Protocol(
            name="datacomp",
            source="mlfoundations/datacomp, which calls CLIP_benchmark",
            follows="clip_benchmark",
            metrics={"map_11point": "map"},
            scores="cosine",
            resize="model",
            candidates="all",
            data="wds",
        ),
        Protocol(name="unicl", source="microsoft/UniCL for ImageNet-1K; the ELEVATER toolkit for everything else"),
        Protocol(name="demo", source="the task files of the demo benchmark"),
        Protocol(name="wds", source="the task folder: its names, prompts and kind of labels"),
    )
}


def load_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        UserError: if there is none.
    """
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(PROTOCOLS)}"
        raise UserError(f"--protocol {name}: no such protocol; {hint}")
    return PROTOCOLS[name]


def statement(task: "Task", class_names: Sequence[str], templates: Sequence[str]) -> dict[str, Any]:
    """What the protocol fixed for a task, JSON-ready, for its result.

    Args:
        task: with the protocol applied.
        class_names: as used in prompts, in label order.
        templates: as used.
    """
    return {
        "metric": task.metric,
        "scores": "100 x cosine" if task.scores == "cosine" else "softmax(100 x cosine)",
        "candidates": task.candidates,
        "resize": task.resize,
        "names_sha256": lines_sha256(class_names),
        "templates_sha256": lines_sha256(templates),
    }


def lines_sha256(lines: Sequence[str]) -> str:
    """SHA-256 of the lines joined by newlines, in UTF-8: the checksum of names and of templates."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _respell(task: "Task", names: tuple[str, ...] | None, respelt: dict[str, str]) -> tuple[str, ...] | None:
    unknown = [name for name in respelt if name not in (names or ())]
    if unknown:
        raise UserError(
            f"{task.id}: respelt names {unknown[0]!r}, which is none of its class names; mend the task file"
        )
    return names if names is None else tuple(respelt.get(name, name) for name in names)
