"""Pictures made from seeds: patterns of coloured cells.

They are drawn in integers, so that they are the same on every machine; a hash of the pixels, not of the compressed
files, tells whether they were.
"""

import io
from typing import Any

import numpy as np
from PIL import Image

CELLS = 4  # along each side of a picture


def patterns(number: int, rng: np.random.Generator) -> np.ndarray:
    """Colours of the cells, int64 (number, CELLS, CELLS, 3)."""
    return rng.integers(0, 256, (number, CELLS, CELLS, 3))


def collage(of_classes: np.ndarray, classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A pattern whose cells are taken from the patterns of several classes; of chance colours where there is none."""
    if len(classes) == 0:
        return rng.integers(0, 256, of_classes.shape[1:])
    owners = classes[rng.integers(0, len(classes), (CELLS, CELLS))]
    rows, columns = np.indices(owners.shape)
    return of_classes[owners, rows, columns]


def draw(pattern: np.ndarray, noise: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The pattern with other colours, enlarged to (H, W), and some noise on each pixel."""
    colours = pattern + rng.integers(-noise, noise + 1, pattern.shape)
    rows, columns = (np.arange(side) * CELLS // side for side in size)
    pixels = colours[rows][:, columns] + rng.integers(-8, 9, (*size, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def compressed(pixels: np.ndarray, extension: str) -> bytes:
    """The file; both formats give the pixels back as they are."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True, "method": 0} if extension == "webp" else {"compress_level": 1}
    Image.fromarray(pixels).save(buffer, extension, **options)
    return buffer.getvalue()


def update_digest(digest: Any, pixels: np.ndarray) -> None:
    """Add a picture's size and pixels."""
    digest.update(repr(pixels.shape).encode() + pixels.tobytes())
