"""The result of a retrieval run: as JSON, as a table, and its ranks as a compact file."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from focalclip.evaluation.retrieval.pairs import PairData
from focalclip.evaluation.retrieval.ranking import Ranks
from focalclip.evaluation.retrieval.recall import Direction

SHOWN = 3  # names in a printed list; all of them are in the JSON


class Seconds(NamedTuple):
    """How long it took."""

    total: float
    images: float
    texts: float
    ranking: float


@dataclass(frozen=True)
class RetrievalResult:
    """Numbers of both directions (fractions in [0, 1]) and where they come from."""

    data: PairData
    """What was ranked: readable images and their captions."""
    ranks: Ranks
    image_to_text: Direction
    """CLIP_benchmark calls it text retrieval."""
    text_to_image: Direction
    """CLIP_benchmark calls it image retrieval."""
    broken: tuple[str, ...]
    """Damaged images, by name; neither they nor their captions are ranked."""
    data_sha256: str
    """Of keys, captions, pairs and images."""
    model: dict[str, Any]
    """source, sha256, and what ``footprint`` tells of the model and the machine."""
    versions: dict[str, str]
    seconds: Seconds

    @property
    def protocol(self) -> str:
        """What counts as right: ``clip_benchmark``'s own pairs alone, or all images of a caption."""
        return "merged_captions" if self.data.is_merged else "clip_benchmark"

    @property
    def score(self) -> float:
        """Mean of both recall@1, DataComp's number for a retrieval set."""
        return (self.image_to_text.recall[1].value + self.text_to_image.recall[1].value) / 2

    @property
    def score_interval(self) -> tuple[float, float]:
        """95% at least: the mean of both intervals, which holds however much the two directions hang together."""
        (low, high), (low2, high2) = self.image_to_text.recall[1].interval, self.text_to_image.recall[1].interval
        return (low + low2) / 2, (high + high2) / 2

    def with_source(self, source: str) -> "RetrievalResult":
        """The same result with the model's source noted."""
        return replace(self, model={"source": source} | self.model)

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-ready values; one task, in the form of a zero-shot result."""
        ways = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        task = {
            "metric": "mean_recall@1",
            "value": self.score,
            "interval": self.score_interval,
            "n": len(self.data.entries),
            "captions": len(self.data.captions),
            "chance": sum(way.recall[1].chance for way in ways.values()) / 2,
            **{name: way.to_json() for name, way in ways.items()},
            "repeated_captions": self.data.repeated,
            "left_out": self.data.faults,
            "broken": self.broken,
            "task_sha256": self.data_sha256,
            "folder": self.data.source,
        }
        return {
            "benchmark": "retrieval",
            "protocol": self.protocol,
            "score": self.score,
            "score_interval": self.score_interval,
            "n_tasks": 1,
            "n_tasks_expected": 1,
            "tasks": {self.data.name: task},
            "missing": {},
            "failed": {},
            "model": self.model,
            "versions": self.versions,
            "seconds": self.seconds.total,
            "seconds_of": {name: round(value, 3) for name, value in self.seconds._asdict().items()},
        }

    def write(self, path: str | Path) -> Path:
        """Write the JSON, whole or not at all."""
        content = json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"
        return _write_whole(Path(path), lambda file: file.write(content.encode()))

    def write_ranks(self, path: str | Path) -> Path:
        """Write the rank of every query as ``.npz``, whole or not at all.

        ``images`` (N,) names, ``captions`` (M,), ``pairs`` (P, 2) image and caption that belong together,
        ``image_to_text`` (N,) and ``text_to_image`` (M,) ranks from 1.
        """
        arrays: dict[str, Any] = {
            "images": np.array([entry.name for entry in self.data.entries]),
            "captions": np.array(self.data.captions),
            "pairs": self.data.pairs.astype(np.int32),
            **{name: ranks.astype(np.int32) for name, ranks in self.ranks._asdict().items()},
        }
        return _write_whole(Path(path), lambda file: np.savez_compressed(file, **arrays))

    def table(self) -> str:
        """The result as text."""
        parts = [self._heading(), self._sizes(), self._grid(), self._score_line(), *self._remarks()]
        return "\n\n".join(part for part in parts if part)

    def _heading(self) -> str:
        model = self.model
        names = [f"retrieval {self.data.name}", str(model.get("source", "")), f"weights {model['sha256'][:12]}"]
        return " · ".join([name for name in names if name] + [f"{model['precision']} on {model['device']}"])

    def _sizes(self) -> str:
        per_image = np.bincount(self.data.pairs[:, 0])
        low, high = per_image.min(), per_image.max()
        each = f"{low}" if low == high else f"{low} to {high}"
        each += f" per image, {self.data.repeated:,} with several images" if self.data.is_merged else " per image"
        took = self.seconds
        return (
            f"{len(self.data.entries):,} images, {len(self.data.captions):,} captions ({each}); images"
            f" {took.images:.1f} s, captions {took.texts:.1f} s, ranking {took.ranking:.1f} s"
        )

    def _grid(self) -> str:
        """One aligned line per number; a ceiling is shown where a perfect model would not reach 100%."""
        ways = {"image -> text": self.image_to_text, "text -> image": self.text_to_image}
        rows: list[tuple[str, ...]] = [("direction", "metric", "value %", "95% interval", "chance %", "ceiling %", "n")]
        for name, way in ways.items():
            for k, recall in way.recall.items():
                first = (name, f"{way.queries:,}") if k == 1 else ("", "")
                ceiling = _percent(recall.ceiling) if recall.ceiling < 1 else ""
                value, chance = _percent(recall.value), _percent(recall.chance)
                rows.append((first[0], f"recall@{k}", value, _span(recall.interval), chance, ceiling, first[1]))
            rows.append(("", "MRR", _percent(way.mrr), _span(way.mrr_interval), "", "", ""))
            rows.append(("", "rank", f"median {way.median_rank:,.0f}, mean {way.mean_rank:,.1f} of {way.candidates:,}"))
        return _align(rows)

    def _score_line(self) -> str:
        return f"score {_percent(self.score)} ({_span(self.score_interval)}): mean of both recall@1"

    def _remarks(self) -> list[str]:
        data, lists = self.data, []
        if data.repeated and not data.is_merged:
            lists.append(
                f"{data.repeated:,} of {len(data.captions):,} captions also stand under another image. Only a caption's"
                " own image counts as right,\nwhich sets the ceilings; --merge-captions counts every image that has"
                " the caption."
            )
        for title, names in (("damaged images", self.broken), ("incomplete samples", data.faults)):
            if names:
                shown = ", ".join(names[:SHOWN]) + (" ..." if names[SHOWN:] else "")
                lists.append(f"left out: {len(names):,} {title}: {shown}")
        return lists


def _align(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their cells, the first two to the left; a row with fewer cells ends in free text."""
    widths = [max(len(row[i]) for row in rows if len(row) == len(rows[0])) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells if len(row) == len(rows[0]) else [*cells[:2], row[-1]]).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def _percent(fraction: float) -> str:
    """One decimal; two below one percent, where chance levels are."""
    return f"{100 * fraction:.1f}" if fraction >= 0.01 or fraction == 0 else f"{100 * fraction:.2f}"


def _span(interval: tuple[float, float]) -> str:
    return f"{_percent(interval[0])} - {_percent(interval[1])}"


def _write_whole(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Write under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        write(file)
    temporary.replace(path)
    return path
