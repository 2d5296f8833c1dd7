"""Pictures of an :class:`~focalclip.explanation.maps.Explanation`: overlays one by one, and all on one sheet."""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from focalclip.base.errors import UserError, first_line, require
from focalclip.data.images import PICTURE_SUFFIXES, decode
from focalclip.data.reader import data_in
from focalclip.explanation.maps import Explanation, explain

MAX_PICTURES = 200  # a sheet of more rows would pass the 65,536 pixels that a picture may be high

_SIDE = 224  # pixels of an overlay at least: what a net of 32 pixels sees is enlarged

_COLOURS = "viridis"  # yellow is high, as in the paper's figures

_OPACITY = 0.65


@dataclass(frozen=True)
class Map:
    """One map over one picture: a title, values (h, w), and the end of the file name."""

    title: str
    values: Tensor
    slug: str


@dataclass(frozen=True)
class Explained:
    """A row of the sheet: a picture's name, the pixels that the net saw (H, W, 3) in [0, 1], and the maps."""

    name: str
    pixels: np.ndarray
    maps: list[Map]


def find_pictures(sources: Sequence[str | Path]) -> list[Path]:
    """The picture files named, and those directly in the folders named, in order.

    Raises:
        UserError: if a source is not there, a folder holds no pictures, there are more than a sheet can show, or what
            draws the sheet is not installed.
    """
    require("drawing", "explain", "matplotlib")
    paths: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = [path for path in data_in(source) if path.suffix.lower() in PICTURE_SUFFIXES]
            if not inside:
                raise UserError(f"{source}: no pictures directly in this folder ({', '.join(PICTURE_SUFFIXES)})")
            paths += inside
        elif source.is_file():
            paths.append(source)
        else:
            raise UserError(f"{source}: no such picture or folder")
    if len(paths) > MAX_PICTURES:
        raise UserError(f"{len(paths)} pictures are too many for one sheet; give at most {MAX_PICTURES}")
    return paths


def explain_picture(model: Any, path: Path, **options: Any) -> tuple[Explanation, Explained]:
    """Explain one picture file; ``options`` are those of :func:`~focalclip.explanation.maps.explain`.

    Raises:
        UserError: if the file is no picture, and whatever ``explain`` raises.
    """
    try:
        image = model.preprocess(decode(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({first_line(error)}); leave it out") from None
    result = explain(model, image[None], **options)
    captions = options.get("text", ())
    return result, Explained(path.name, _as_seen(image, model.preprocess), _maps(result, captions))


def _as_seen(image: Tensor, preprocess: Callable[[Image.Image], Tensor]) -> np.ndarray:
    """The pixels behind a preprocessed image (3, H, W), as (H, W, 3) in [0, 1].

    What black and white become tells the normalisation, whoever wrote the preprocessing.
    """
    height, width = image.shape[-2:]
    black, white = (
        preprocess(Image.new("RGB", (width, height), colour)).mean((1, 2))[:, None, None]
        for colour in ("black", "white")
    )
    return ((image - black) / (white - black)).clamp(0, 1).permute(1, 2, 0).numpy()


def _maps(result: Explanation, captions: Sequence[str]) -> list[Map]:
    """The maps of the first image, in the order of the paper's figure 5: levels, global; then modulator, captions."""
    gates = [
        Map(name, gate, name.split(" (")[0].replace(" ", ""))
        for name, gate in zip(result.gate_names, result.gates[0], strict=True)
    ]
    similar = [
        Map(f"“{caption}”", values, f"text{i}-" + re.sub(r"\W+", "-", caption).strip("-")[:40])
        for i, (caption, values) in enumerate(zip(captions, result.similarity[0], strict=True), 1)
    ]
    return [*gates, Map("modulator", result.modulator[0], "modulator"), *similar]


def overlay(pixels: np.ndarray, values: Tensor) -> Image.Image:
    """``values`` (h, w), in colours from their own lowest to their highest, over the grey picture (H, W, 3)."""
    from matplotlib import colormaps

    picture = _enlarge(pixels).mean(2, keepdims=True)  # grey: only the map has colours
    colours = colormaps[_COLOURS](_unit_range(_stretch(values, picture.shape[:2])))[..., :3]
    blended = (1 - _OPACITY) * picture + _OPACITY * colours
    return Image.fromarray((blended * 255).round().astype(np.uint8))


def write_overlays(explained: Explained, folder: Path, prefix: str) -> list[Path]:
    """One PNG for each map of a picture, called ``PREFIX-MAP.png``."""
    paths = []
    for item in explained.maps:
        paths.append(folder / f"{prefix}-{item.slug}.png")
        overlay(explained.pixels, item.values).save(paths[-1])
    return paths


def write_sheet(rows: Sequence[Explained], title: str, path: Path) -> Path:
    """All pictures and maps on one PNG: a row for each picture, a colour scale for each map."""
    figure, axes = _grid(len(rows), 1 + len(rows[0].maps), title)
    for line, row in zip(axes, rows, strict=True):
        picture = _enlarge(row.pixels)
        line[0].imshow(picture)
        line[0].set_xlabel(_short(row.name), fontsize=7, parse_math=False)
        for cell, item in zip(line[1:], row.maps, strict=True):
            cell.imshow(overlay(row.pixels, item.values))
            _label_range(cell, item.values)
    for cell, name in zip(axes[0], ["picture", *(item.title for item in rows[0].maps)], strict=True):
        cell.set_title(_short(name), fontsize=8, parse_math=False)
    return _write(figure, path)


def write_kernels(result: Explanation, title: str, path: Path) -> Path:
    """The depthwise kernels of the block, mean over channels, one after the other."""
    figure, axes = _grid(1, len(result.kernels), title)
    for cell, kernel in zip(axes[0], result.kernels, strict=True):
        cell.imshow(kernel.numpy(), cmap=_COLOURS)
        cell.set_title(f"{kernel.shape[0]}x{kernel.shape[1]}", fontsize=8)
        _label_range(cell, kernel)
    return _write(figure, path)


def _grid(rows: int, columns: int, title: str) -> tuple[Any, np.ndarray]:
    """A figure of square cells without ticks, with a title and the colour scale."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(1.45 * columns, 4), 1.6 * rows + 0.9), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=9, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False)
    for cell in axes.flat:
        cell.set(xticks=[], yticks=[])
    scale = figure.colorbar(
        ScalarMappable(cmap=colormaps[_COLOURS]), ax=axes, location="bottom", aspect=40, shrink=0.6, pad=0.02
    )
    scale.set_ticks([0, 1], labels=["lowest of each map", "highest"], fontsize=7)
    return figure, axes


def _write(figure: Any, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a caption in a script that the font lacks
        figure.savefig(path, metadata={"Software": None})  # the same bytes on every run
    return path


def _label_range(cell: Any, values: Tensor) -> None:
    cell.set_xlabel(f"{values.min():.3g} to {values.max():.3g}", fontsize=7)


def _enlarge(pixels: np.ndarray) -> np.ndarray:
    """Repeat the pixels of a small picture, up to about ``_SIDE``."""
    factor = max(_SIDE // min(pixels.shape[:2]), 1)
    return pixels.repeat(factor, 0).repeat(factor, 1)


def _stretch(values: Tensor, size: tuple[int, int]) -> np.ndarray:
    """(h, w) to ``size``, bilinear as in the paper's figures."""
    return F.interpolate(values[None, None], size, mode="bilinear", align_corners=False)[0, 0].numpy()


def _unit_range(values: np.ndarray) -> np.ndarray:
    """Lowest to 0, highest to 1; a constant map becomes 0."""
    low, high = values.min(), values.max()
    return np.zeros_like(values) if low == high else (values - low) / (high - low)


def _short(text: str, longest: int = 22) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
