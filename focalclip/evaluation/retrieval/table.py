"""A retrieval result as text, to be read in a terminal."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from focalclip.evaluation.retrieval.result import RetrievalResult

SHOWN = 3  # names in a printed list; all of them are in the JSON


def result_table(result: "RetrievalResult") -> str:
    """Whose numbers these are, on what, the numbers, and what there is to know about them."""
    return "\n\n".join([_heading(result), _sizes(result), _grid(result), _score_line(result), *_remarks(result)])


def _heading(result: "RetrievalResult") -> str:
    model = result.model
    names = [f"retrieval {result.data.name}", str(model.get("source", "")), f"weights {model['sha256'][:12]}"]
    return " · ".join([name for name in names if name] + [f"{model['precision']} on {model['device']}"])


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
    rows: list[tuple[str, ...]] = [("direction", "metric", "value %", "95% interval", "chance %", "ceiling %", "n")]
    for name, way in (("image -> text", result.image_to_text), ("text -> image", result.text_to_image)):
        for k, recall in way.recall.items():
            direction, n = (name, f"{way.queries:,}") if k == 1 else ("", "")
            ceiling = _percent(recall.ceiling) if recall.ceiling < 1 else ""
            value, chance = _percent(recall.value), _percent(recall.chance)
            rows.append((direction, f"recall@{k}", value, _span(recall.interval), chance, ceiling, n))
        rows.append(("", "MRR", _percent(way.mrr), _span(way.mrr_interval), "", "", ""))
        median = f"{way.median_rank:,.1f}".removesuffix(".0")
        rows.append(("", "rank", f"median {median}, mean {way.mean_rank:,.1f} of {way.candidates:,}"))
    return _align(rows)


def _score_line(result: "RetrievalResult") -> str:
    return f"score {_percent(result.score)} ({_span(result.score_interval)}): mean of both recall@1"


def _remarks(result: "RetrievalResult") -> list[str]:
    data, remarks = result.data, []
    if data.repeated and not data.is_merged:
        remarks.append(
            f"{data.repeated:,} of {len(data.captions):,} captions also stand under another image. Only a caption's"
            " own image counts as right,\nwhich sets the ceilings; --merge-captions counts every image that has it."
        )
    for title, names in (("damaged images", result.broken), ("incomplete samples", data.faults)):
        if names:
            shown = ", ".join(names[:SHOWN]) + (" ..." if names[SHOWN:] else "")
            remarks.append(f"left out: {len(names):,} {title}: {shown}")
    return remarks


def _align(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their cells, the first two to the left; a row with fewer cells ends in free text."""
    widths = [max(len(row[i]) for row in rows if len(row) == len(rows[0])) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[i].ljust(widths[i]) if i < 2 else row[i].rjust(widths[i]) for i in range(len(row))]
        cells = cells if len(row) == len(rows[0]) else [*cells[:-1], row[-1]]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def _percent(fraction: float) -> str:
    """One decimal; two below one percent, where chance levels are."""
    return f"{100 * fraction:.1f}" if fraction >= 0.01 or fraction == 0 else f"{100 * fraction:.2f}"


def _span(interval: tuple[float, float]) -> str:
    return f"{_percent(interval[0])} - {_percent(interval[1])}"
