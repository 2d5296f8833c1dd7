"""Task folders made from seeds: the wds layout of CLIP_benchmark, with patterns of colour for pictures.

Pictures are drawn in integers, so that they are the same on every machine; a hash of the pixels, not of the compressed
files, tells whether they were.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from focalclip.data.write import write_shards

CELLS = 4  # cells of colour along each side of a picture


@dataclass(frozen=True)
class SyntheticTask:
    """A task folder to be made."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    labels: np.ndarray
    """int64 (N,), or bool (N, C) for a multi-label task."""
    seed: int
    sizes: tuple[tuple[int, int], ...] = ((40, 52),)
    """Heights and widths of the pictures, in turn."""
    extensions: tuple[str, ...] = ("png",)
    """``png`` or ``webp`` (lossless, as clip_benchmark's exporter writes it), in turn."""
    shards: int = 1
    noise: int = 40
    """How far the colours of a class's pictures lie apart, of 255."""

    def pictures(self) -> Iterator[np.ndarray]:
        """uint8 (H, W, 3) pictures, one per label: those of one class share a pattern of coloured cells."""
        rng = np.random.default_rng(self.seed)
        patterns = rng.integers(0, 256, (len(self.names), CELLS, CELLS, 3))
        for i, label in enumerate(self.labels):
            of_class = patterns[label] if label.ndim == 0 else _collage(patterns, np.flatnonzero(label), rng)
            yield _picture(of_class, self.noise, self.sizes[i % len(self.sizes)], rng)

    def write(self, folder: Path) -> str:
        """Write the folder in the wds layout; returns the SHA-256 of names, prompts, labels and pixels."""
        digest = hashlib.sha256("\n".join([*self.names, "", *self.templates]).encode() + self.labels.tobytes())
        write_shards(self._samples(digest), folder / "test", -(-len(self.labels) // self.shards), name="{}.tar")
        (folder / "test" / "nshards.txt").write_text(f"{self.shards}\n")
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in self.names))
        (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in self.templates))
        if self.labels.ndim == 2:
            (folder / "dataset_type.txt").write_text("multilabel\n")
        return digest.hexdigest()

    def _samples(self, digest: Any) -> Iterator[dict[str, Any]]:
        for i, (pixels, label) in enumerate(zip(self.pictures(), self.labels, strict=True)):
            digest.update(repr(pixels.shape).encode() + pixels.tobytes())
            extension = self.extensions[i % len(self.extensions)]
            truth = {"cls": int(label)} if label.ndim == 0 else {"npy": _npy(label.astype(np.int64))}
            yield {"__key__": f"s{i:07d}", extension: _compressed(pixels, extension), **truth}


def _collage(patterns: np.ndarray, classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A pattern whose cells are taken from the patterns of several classes; of chance colours where there is none."""
    if len(classes) == 0:
        return rng.integers(0, 256, patterns.shape[1:])
    owners = classes[rng.integers(0, len(classes), (CELLS, CELLS))]
    rows, columns = np.indices(owners.shape)
    return patterns[owners, rows, columns]


def _picture(pattern: np.ndarray, noise: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The pattern with other colours, enlarged to (H, W), and some noise on each pixel."""
    colours = pattern + rng.integers(-noise, noise + 1, pattern.shape)
    rows, columns = (np.arange(side) * CELLS // side for side in size)
    pixels = colours[rows][:, columns] + rng.integers(-8, 9, (*size, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def _compressed(pixels: np.ndarray, extension: str) -> bytes:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True, "method": 0} if extension == "webp" else {"compress_level": 1}
    Image.fromarray(pixels).save(buffer, extension, **options)
    return buffer.getvalue()


def _npy(vector: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, vector)
    return buffer.getvalue()
