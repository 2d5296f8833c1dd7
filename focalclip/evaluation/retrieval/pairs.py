"""Images and the captions that belong to them, read in full before the first image is encoded."""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from focalclip.base.errors import UserError
from focalclip.base.files import user_path
from focalclip.data.reader import Entry, Request
from focalclip.data.sources import open_source


@dataclass(frozen=True)
class PairData:
    """A retrieval set: which caption belongs to which image. Every image has a caption and every caption an image."""

    name: str
    """What results call it."""
    source: str
    """Where it came from."""
    entries: tuple[Entry, ...]
    """The images (N)."""
    captions: tuple[str, ...]
    """(M,)."""
    pairs: NDArray[np.int64]
    """(P, 2): image and caption; P is M unless captions are merged."""
    faults: tuple[str, ...] = ()
    """What was left out, by name, each with the reason: pictures without captions, blank captions, rows without a
    picture."""

    @property
    def repeated(self) -> int:
        """Captions that another image has too, word for word."""
        if self.is_merged:
            return int((np.bincount(self.pairs[:, 1]) > 1).sum())
        _, group = self.distinct()
        places = np.unique(group[self.pairs[:, 1]] * len(self.entries) + self.pairs[:, 0])  # each text at each image
        return int((np.bincount(places // len(self.entries))[group] > 1).sum())

    @property
    def is_merged(self) -> bool:
        """Whether a caption may have several images."""
        return len(self.pairs) > len(self.captions)

    def distinct(self) -> tuple[list[str], NDArray[np.int64]]:
        """The different captions in order of appearance, and which of them each caption (M,) is."""
        place: dict[str, int] = {}
        index = [place.setdefault(caption, len(place)) for caption in self.captions]
        return list(place), np.array(index, dtype=np.int64)

    def merged(self) -> "PairData":
        """The same with equal captions made one, which belongs to all of its images."""
        captions, group = self.distinct()
        pairs = np.unique(self.pairs[:, 0] * len(captions) + group[self.pairs[:, 1]])
        return replace(self, captions=tuple(captions), pairs=np.stack(np.divmod(pairs, len(captions)), axis=1))

    def keep(self, images: NDArray[np.bool_]) -> "PairData":
        """Only these of the images, and the captions that belong to one of them."""
        if images.all():
            return self
        pairs = self.pairs[images[self.pairs[:, 0]]]
        captions, caption = np.unique(pairs[:, 1], return_inverse=True)
        image = (np.cumsum(images) - 1)[pairs[:, 0]]
        return replace(
            self,
            entries=tuple(entry for entry, is_kept in zip(self.entries, images, strict=True) if is_kept),
            captions=tuple(self.captions[i] for i in captions),
            pairs=np.stack([image, caption], axis=1),
        )

    def digest(self, images_sha256: str) -> str:
        """SHA-256 of everything that decides a result: keys, captions, pairs and the images' own digest."""
        whole = hashlib.sha256()
        for lines in ([entry.key for entry in self.entries], self.captions):
            whole.update("\n".join(lines).encode() + b"\0")
        whole.update(np.ascontiguousarray(self.pairs).tobytes() + images_sha256.encode())
        return whole.hexdigest()


def open_pairs(
    source: str | Path,
    *,
    split: str = "test",
    image_root: str | Path | None = None,
    limit: int | None = None,
    captions_per_image: int | None = None,
) -> PairData:
    """Read a retrieval set; its images are left where they are.

    Args:
        source: any source with captions that ``focalclip.data.sources`` knows.
        split: subfolder of a task folder, or split of a Karpathy file; sources without splits ignore it.
        image_root: what image paths of a table or caption file are relative to; None: the folder of that file.
        limit: use only the first so many images; None for all.
        captions_per_image: how many captions of an image are used, from its first; None for all.

    Raises:
        UserError: naming the file at fault: nothing is there, it is of no known kind, broken, or lacks a column or a
            split, or images that it names are missing, or it has no captions.
    """
    root = user_path(image_root) if image_root else None
    found = open_source(str(source), Request(split, root, limit, "--data"))
    if found.captions is None:
        raise UserError(f"--data {source}: has classes and no captions; measure it with eval/zeroshot.py")
    entries, captions, image_of, faults = [], [], [], []
    for number, (entry, texts) in enumerate(zip(found.entries[:limit], found.captions, strict=False)):
        blank = found.blank.get(number, 0)
        if not texts:
            reason = "blank captions" if blank else found.faults.get(number, "no caption")
            faults.append(f"{entry.name} ({reason})")
            continue
        if blank:
            faults.append(f"{entry.name} ({blank} of {blank + len(texts)} captions blank)")
        texts = texts[:captions_per_image]
        image_of += [len(entries)] * len(texts)
        captions += texts
        entries.append(entry)
    faults += found.left_out
    if not entries:
        first = f" ({faults[0]})" if faults else ""
        raise UserError(f"--data {source}: no image with a caption in it{first}; see --help for what it can be")
    pairs = np.stack([np.array(image_of), np.arange(len(captions))], axis=1)
    name = found.name or Path(os.path.abspath(found.place)).name  # noqa: PTH100 (a link's own name)
    return PairData(name, str(source), tuple(entries), tuple(captions), pairs, tuple(faults))
