"""Classification task folders made from seeds, in the wds layout of CLIP_benchmark."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from focalclip.bench.pictures import collage, compressed, draw, patterns, update_digest
from focalclip.data.write import write_shards


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
    """At most."""
    noise: int = 40
    """How far the colours of a class's pictures lie apart, of 255."""

    def pictures(self) -> Iterator[np.ndarray]:
        """uint8 (H, W, 3) pictures, one per label: those of one class share a pattern of coloured cells."""
        rng = np.random.default_rng(self.seed)
        of_classes = patterns(len(self.names), rng)
        for i, label in enumerate(self.labels):
            pattern = of_classes[label] if label.ndim == 0 else collage(of_classes, np.flatnonzero(label), rng)
            yield draw(pattern, self.noise, self.sizes[i % len(self.sizes)], rng)

    def write(self, folder: Path) -> str:
        """Write the folder in the wds layout; returns the SHA-256 of names, prompts, labels and pixels."""
        digest = hashlib.sha256("\n".join([*self.names, "", *self.templates]).encode() + self.labels.tobytes())
        per_shard = -(-len(self.labels) // self.shards)
        shards = write_shards(self._samples(digest), folder / "test", per_shard, name="{}.tar")
        (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in self.names))
        (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in self.templates))
        if self.labels.ndim == 2:
            (folder / "dataset_type.txt").write_text("multilabel\n")
        return digest.hexdigest()

    def _samples(self, digest: Any) -> Iterator[dict[str, Any]]:
        for i, (pixels, label) in enumerate(zip(self.pictures(), self.labels, strict=True)):
            update_digest(digest, pixels)
            extension = self.extensions[i % len(self.extensions)]
            truth = {"cls": int(label)} if label.ndim == 0 else {"npy": _npy(label.astype(np.int64))}
            yield {"__key__": f"s{i:07d}", extension: compressed(pixels, extension), **truth}


def _npy(vector: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, vector)
    return buffer.getvalue()
