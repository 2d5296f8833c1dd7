"""Retrieval folders made from seeds, in the wds layout of CLIP_benchmark."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from focalclip.bench.pictures import compressed, draw, patterns, update_digest
from focalclip.data.write import write_shards


@dataclass(frozen=True)
class SyntheticPairs:
    """A folder of images with one or more captions each."""

    captions: tuple[tuple[str, ...], ...]
    """Of each image."""
    seed: int
    shards: int = 1
    size: tuple[int, int] = (40, 52)

    def pictures(self) -> Iterator[np.ndarray]:
        """uint8 (H, W, 3) pictures, each of a pattern of its own."""
        rng = np.random.default_rng(self.seed)
        for pattern in patterns(len(self.captions), rng):
            yield draw(pattern, 0, self.size, rng)

    def write(self, folder: Path) -> str:
        """Write the folder; returns the SHA-256 of captions and pixels."""
        digest = hashlib.sha256("\n\n".join("\n".join(own) for own in self.captions).encode())
        per_shard = -(-len(self.captions) // self.shards)
        shards = write_shards(self._samples(digest), folder / "test", per_shard, name="{}.tar")
        (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
        (folder / "dataset_type.txt").write_text("retrieval\n")
        return digest.hexdigest()

    def _samples(self, digest: Any) -> Iterator[dict[str, Any]]:
        for i, (pixels, own) in enumerate(zip(self.pictures(), self.captions, strict=True)):
            update_digest(digest, pixels)
            yield {"__key__": f"s{i:07d}", "png": compressed(pixels, "png"), "txt": "\n".join(own)}
