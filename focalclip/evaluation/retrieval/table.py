"""A retrieval result as text, to be read in a terminal."""

from typing import TYPE_CHECKING

import numpy as np

from focalclip.printed import aligned, model_heading, percent, some, span

if TYPE_CHECKING:
    from focalclip.evaluation.retrieval.result import RetrievalResult


def result_table(result: "RetrievalResult") -> str:
    """Whose numbers these are, on what, the numbers, and what there is to know about them."""
    heading = model_heading(f"retrieval {result.data.name}", result.model)
    return "\n\n".join([heading, _sizes(result), _grid(result), _score_line(result), *_remarks(result)])


def _sizes(result: "RetrievalResult") -> str:
    data, took = result.data, result.seconds
    per_image = np.bincount(data.pairs[:, 0])
    low, high = per_image.min(), per_image.max()
    each = f"{low} per image" if low == high else f"{low} to {high} per image"
    each += f", {data.repeated:,} with several images" if data.is_merged else ""
    return (
        f"{len(data.entries):,} images, {len(data.captions):,} captions ({each}); images {took.images:.1f} s, captions"
        f" {took.texts:.1f} s, ranking {took.ranking:.1f} s"
    )


def _grid(result: "RetrievalResult") -> str:
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


def _score_line(result: "RetrievalResult") -> str:
    return f"score {percent(result.score)} (95% interval {span(result.score_interval)}): mean of both recall@1"


def _remarks(result: "RetrievalResult") -> list[str]:
    data, remarks = result.data, []
    if data.repeated and not data.is_merged:
        remarks.append(
            f"{data.repeated:,} of {len(data.captions):,} captions also stand under another image. Only a caption's"
            " own image counts as right,\nwhich sets the ceilings; --merge-captions counts every image that has it."
        )
    total = len(data.entries) + len(data.faults) + len(result.broken)
    for title, names in (("damaged images", result.broken), ("incomplete samples", data.faults)):
        if names:
            remarks.append(f"{title}, left out: {some(names, total)}")
    return remarks
