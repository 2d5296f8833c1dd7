"""The page beside shards (``index.html``): counts, sizes, lengths of captions, classes, and a grid of samples."""

import base64
import json
import math
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from focalclip.base.files import write_text
from focalclip.data.images import decode_array
from focalclip.data.index import IMAGE, JSON, TEXT, load_keys, load_members, read_captions
from focalclip.data.shards import OVERVIEW
from focalclip.data.store import read_ranges
from focalclip.data.write import Written, read_summary

_SAMPLES = 24  # pictures in the grid

_SIDE = 160  # pixels of the shorter side of a picture in the grid

_BARS = 24  # at most, of a histogram

_CLASSES = 30  # bars of classes, the most frequent


def write_overview(folder: Path) -> Path:
    """Write the page of shards that :func:`focalclip.data.write.write_pictures` wrote, as far as they are finished.

    Returns:
        The page, one file that fetches nothing.

    Raises:
        OSError: if it cannot be written, or the shards cannot be read.
    """
    source, written = read_summary(folder)
    shards = sorted(folder.glob("*.tar"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("focalclip.reports") / "shards.html").read_text(encoding="utf-8"))
    page = template.render(
        css=Markup((files("focalclip.reports") / "page.css").read_text(encoding="utf-8")),
        title=folder.resolve().name,
        source=source["source"],
        rules=[f"{name.replace('_', ' ')} {value}" for name, value in source["rules"].items()],
        facts=_facts(written, shards),
        charts=_charts(written),
        left_out=[(reason, len(names), names[:3]) for reason, names in _by_count(written)],
        samples=list(_samples(shards)),
    )
    return write_text(folder / OVERVIEW, page)


def _by_count(written: Written) -> list[tuple[str, list[str]]]:
    return sorted(written.left_out.items(), key=lambda item: -len(item[1]))


def _facts(written: Written, shards: list[Path]) -> list[tuple[str, str]]:
    size = sum(shard.stat().st_size for shard in shards)
    unit = "GB" if size >= 1e9 else "MB" if size >= 1e6 else "kB"
    amount = size / {"GB": 1e9, "MB": 1e6, "kB": 1e3}[unit]
    captions = written.words.total()
    facts = [
        ("pictures", f"{written.samples:,}"),
        ("captions", f"{captions:,} ({captions / max(1, written.samples):.2f} a picture)"),
        ("shards", f"{written.shards:,} ({amount:.1f} {unit})"),
        ("left out", f"{sum(map(len, written.left_out.values())):,} pictures"),
        ("shorter side, median", f"{_median(written.sides)} pixels"),
        ("words of a caption, median", str(_median(written.words))),
    ]
    if written.classes:
        facts.append(("classes", f"{len(written.classes):,}"))
    return facts


def _median(counts: Counter[int]) -> int:
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    return values[int(np.searchsorted(below, below[-1] / 2))] if values else 0


def _charts(written: Written) -> list[dict[str, Any]]:
    charts = [
        {"name": "Shorter side of the pictures, in pixels", "bars": _histogram(written.sides)},
        {"name": "Words of the captions", "bars": _histogram(written.words)},
    ]
    if written.classes:
        more = len(written.classes) - _CLASSES
        name = f"Classes, the {_CLASSES} most frequent of {len(written.classes):,}" if more > 0 else "Classes"
        charts.append({"name": name, "bars": _bars(written.classes.most_common(_CLASSES))})
    return [chart for chart in charts if chart["bars"]]


def _histogram(counts: Counter[int]) -> list[dict[str, Any]]:
    """Bars of equal width in the values, which is a round number."""
    if not counts:
        return []
    low, high = min(counts), max(counts)
    rough = (high - low + 1) / _BARS
    power = 10 ** math.floor(math.log10(rough)) if rough > 1 else 1
    width = next(int(step * power) for step in (1, 2, 5, 10) if step * power >= rough)
    bins = Counter[int]()
    for value, count in counts.items():
        bins[value // width] += count
    span = range(low // width, high // width + 1)
    return _bars((f"{i * width}" if width == 1 else f"{i * width}-{(i + 1) * width - 1}", bins[i]) for i in span)


def _bars(counts: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    items = list(counts)
    most = max(count for _, count in items)
    return [{"name": name, "count": count, "percent": round(100 * count / most, 2)} for name, count in items]


def _samples(shards: list[Path]) -> list[dict[str, Any]]:
    """Pictures from all parts of the shards, at equal distances, small."""
    tables = {shard: load_members(shard) for shard in _spread(shards)}
    places = [(shard, i) for shard, table in tables.items() for i in range(len(table))]
    return [_sample(shard, i, tables[shard][i]) for shard, i in _spread(places)]


def _spread(items: list[Any]) -> list[Any]:
    return [items[i * len(items) // _SAMPLES] for i in range(_SAMPLES)] if len(items) > _SAMPLES else items


def _sample(shard: Path, number: int, places: np.ndarray) -> dict[str, Any]:
    columns = [column for column in (IMAGE, TEXT, JSON) if places[column][1] >= 0]
    parts = dict(zip(columns, read_ranges(shard, [tuple(places[column].tolist()) for column in columns]), strict=True))
    sample = {"key": f"{shard.name}: {load_keys(shard)[number]}", "uri": "", "captions": [], "classes": []}
    try:
        small = Image.fromarray(decode_array(parts[IMAGE], _SIDE))
        small.thumbnail((2 * _SIDE, _SIDE))
        jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality=80, colorspace="RGB")
        sample["uri"] = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
        sample["captions"] = read_captions(parts.get(TEXT), parts.get(JSON), keywords=False).captions
        sample["classes"] = json.loads(parts.get(JSON, b"{}")).get("class_names", [])
    except ValueError as error:
        sample["captions"] = [str(error)]  # damage inside a copied picture, which training counts and names
    return sample
