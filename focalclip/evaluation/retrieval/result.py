"""The result of a retrieval run: as JSON, its ranks as a compact file, and as a table.

Importing this needs no torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from focalclip.base.files import user_path, whole_file, write_json
from focalclip.base.terminal import aligned, model_heading, percent, some, span
from focalclip.evaluation.retrieval.pairs import PairData
from focalclip.evaluation.retrieval.recall import Direction


class Ranks(NamedTuple):
    """Place of the best right answer among all candidates; 1 is the first."""

    image_to_text: NDArray[np.int64]
    """(N,): each image asks for one of its texts."""
    text_to_image: NDArray[np.int64]
    """(M,): each text asks for (one of) its images."""


class RetrievalSeconds(NamedTuple):
    """Seconds on the clock."""

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
    """source, sha256, and what ``features.model.describe`` returns."""
    versions: dict[str, str]
    seconds: RetrievalSeconds

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
        """95% at least: the mean of both intervals, valid for any correlation of the two directions."""
        (low, high), (low2, high2) = self.image_to_text.recall[1].interval, self.text_to_image.recall[1].interval
        return (low + low2) / 2, (high + high2) / 2

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
        return write_json(path, self.to_json())

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
        path = user_path(path)
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        return path


def retrieval_table(result: RetrievalResult) -> str:
    """The result for a terminal: model and data, one line per number, the score, and what was left out."""
    heading = model_heading(f"retrieval {result.data.name}", result.model)
    return "\n\n".join([heading, _sizes(result), _grid(result), _score_line(result), *_remarks(result)])


def _sizes(result: RetrievalResult) -> str:
    data, took = result.data, result.seconds
    per_image = np.bincount(data.pairs[:, 0])
    low, high = per_image.min(), per_image.max()
    each = f"{low} per image" if low == high else f"{low} to {high} per image"
    each += f", {data.repeated:,} with several images" if data.is_merged else ""
    return (
        f"{len(data.entries):,} images, {len(data.captions):,} captions ({each}); images {took.images:.1f} s, captions"
        f" {took.texts:.1f} s, ranking {took.ranking:.1f} s"
    )


def _grid(result: RetrievalResult) -> str:
    """One aligned line per number; a ceiling is shown where a perfect model would not reach 100%."""
    rows = [("direction", "metric", "value %", "95% interval", "chance %", "ceiling %", "n")]
    ranks = []
    for name, way in (("image -> text", result.image_to_text), ("text -> image", result.text_to_image)):
        for k, recall in way.recall.items():
            direction, n = (name, f"{way.queries:,}") if k == 1 else ("", "")
            ceiling = percent(recall.ceiling) if recall.ceiling < 1 else ""
            value, chance = percent(recall.value), percent(recall.chance)
            rows.append((direction, f"recall@{k}", value, span(recall.interval), chance, ceiling, n))
        rows.append(("", "MRR", percent(way.mrr), span(way.mrr_interval), "", "", ""))
        median = f"{way.median_rank:,.1f}".removesuffix(".0")
        ranks.append(f"rank {name}: median {median}, mean {way.mean_rank:,.1f} of {way.candidates:,}")
    return "\n".join([*aligned(rows, left=(0, 1)), "", *ranks])


def _score_line(result: RetrievalResult) -> str:
    return f"score {percent(result.score)} (95% interval {span(result.score_interval)}): mean of both recall@1"


def _remarks(result: RetrievalResult) -> list[str]:
    data, remarks = result.data, []
    if data.repeated and not data.is_merged:
        remarks.append(
            f"{data.repeated:,} of {len(data.captions):,} captions also belong to another image. Only a caption's"
            " own image counts as right,\nwhich sets the ceilings; --merge-captions counts every image that has it."
        )
    total = len(data.entries) + len(data.faults) + len(result.broken)
    for title, names in (("damaged images", result.broken), ("incomplete or blank", data.faults)):
        if names:
            remarks.append(f"{title}, left out: {some(names, total)}")
    return remarks
