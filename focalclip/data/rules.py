"""What of a source goes into shards, and how: filters on pictures and captions, smaller copies, duplicates."""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from focalclip.base.errors import UserError, require
from focalclip.data.images import SHARD_SUFFIXES, decode, decode_array, inspect

NO_TEXT = "neither caption nor label"

DAMAGED = "damaged, or not a picture"

UNREADABLE = "cannot be read"

COPY = "a copy of an earlier picture"

FAULTS = (DAMAGED, UNREADABLE)
"""Reasons that no filter asked for: pictures left out for them are limited in number."""

_HASH_BITS = 64
_HASHED_SIDE = 64  # pixels that a picture's shorter side keeps before it is hashed; the hash itself is of 32 x 32

_MAX_PIECED = 4  # bits: beyond it, pieces of a hash are so short that many hashes share one

_SLACK = 1.25  # a picture is decoded to so many times the side it is resized to: the two filters then blur little


class Refused(ValueError):
    """A picture that is left out."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


class ShardPicture(NamedTuple):
    """A picture as a shard holds it."""

    extension: str
    content: bytes
    width: int
    """Of the pixels as they are stored, before a rotation by EXIF."""
    height: int


@dataclass(frozen=True)
class Rules:
    """Filters and changes; the defaults leave out nothing that can be trained on, and change no byte.

    Raises:
        UserError: if a rule contradicts itself.
    """

    min_side: int = 0
    """Pixels that the shorter side must have."""
    max_aspect: float | None = None
    """Longer side over shorter side."""
    min_words: int = 0
    """Words (separated by white space) that a caption must have; captions outside the limits are dropped, and a picture
    is left out when none remains. Prompts of classes are not measured."""
    max_words: int | None = None
    min_chars: int = 0
    max_chars: int | None = None
    duplicates: int | None = None
    """Leave out a picture whose perceptual hash of 64 bits differs in at most so many from that of an earlier one."""
    resize: int | None = None
    """Pixels of the shorter side of pictures that are larger; the others keep their bytes."""
    quality: int = 95
    """Of the JPEGs that resized pictures become, 1 to 100."""
    verify: bool = False
    """Decode every picture, also those that are copied."""

    def __post_init__(self) -> None:
        for what in ("words", "chars"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if high is not None and low > high:
                raise UserError(f"--min-{what} {low} is more than --max-{what} {high}, so no caption fits; swap them")
        if self.max_aspect is not None and not self.max_aspect >= 1:
            raise UserError(
                f"--max-aspect {self.max_aspect:g}: longer over shorter side is at least 1; give such a number"
            )
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: give a number from 1 to 100")
        if self.duplicates is not None:
            require("--duplicates", "shards", "imagehash")
            if self.duplicates > _HASH_BITS // 4:
                raise UserError(
                    f"--duplicates {self.duplicates}: hashes of unlike pictures differ in about {_HASH_BITS // 2} of"
                    f" {_HASH_BITS} bits; give 0 (the same picture) to {_HASH_BITS // 4}"
                )

    def kept_captions(self, captions: Sequence[str]) -> tuple[str, ...]:
        """Those captions that have the wanted lengths, in their order."""
        return tuple(caption for caption in captions if self._fits(caption))

    def _fits(self, caption: str) -> bool:
        words = len(caption.split()) if self.min_words or self.max_words is not None else 0
        return (
            self.min_words <= words <= (math.inf if self.max_words is None else self.max_words)
            and self.min_chars <= len(caption) <= (math.inf if self.max_chars is None else self.max_chars)
        )  # fmt: skip

    @property
    def caption_rule(self) -> str:
        """The limits of captions in words; empty where there are none."""
        limits = [
            f"{low or 0} to {'any number of' if high is None else high} {what}"
            for what, low, high in (
                ("words", self.min_words, self.max_words),
                ("characters", self.min_chars, self.max_chars),
            )
            if low or high is not None
        ]
        return " and ".join(limits)

    def check(self, content: bytes) -> tuple[str, int, int]:
        """Format, width and height of a picture that no filter on pictures leaves out.

        Raises:
            Refused: with the reason.
        """
        try:
            head = inspect(content)
        except ValueError as error:
            raise Refused(DAMAGED, str(error)) from None
        short, long = sorted((head.width, head.height))
        if short < self.min_side:
            raise Refused(f"smaller than {self.min_side} pixels", f"{head.width} x {head.height}")
        if self.max_aspect is not None and long > self.max_aspect * short:
            raise Refused(f"one side over {self.max_aspect:g} times the other", f"{head.width} x {head.height}")
        return head

    def apply(self, content: bytes) -> ShardPicture:
        """A picture as it goes into a shard: its own bytes wherever no rule asks otherwise.

        Raises:
            Refused: with the reason.
        """
        kind, width, height = self.check(content)
        extension = SHARD_SUFFIXES.get(kind)
        try:
            if self.resize is not None and min(width, height) > self.resize:
                return _resized(content, self.resize, self.quality)
            if extension is None:  # a format that shards do not hold
                buffer = io.BytesIO()
                decode(content).save(buffer, "PNG")
                return ShardPicture("png", buffer.getvalue(), width, height)
            if self.verify:
                decode_array(content, 1)
        except ValueError as error:
            raise Refused(DAMAGED, str(error)) from None
        return ShardPicture(extension, content, width, height)

    def fingerprint(self, content: bytes) -> int:
        """The perceptual hash of a picture that no other filter leaves out, in 64 bits.

        Raises:
            Refused: with the reason.
        """
        import imagehash
        from PIL import Image

        self.check(content)
        try:
            picture = Image.fromarray(decode_array(content, _HASHED_SIDE))
        except ValueError as error:
            raise Refused(DAMAGED, str(error)) from None
        return int(str(imagehash.phash(picture, hash_size=8)), 16)


def _resized(content: bytes, side: int, quality: int) -> ShardPicture:
    """An upright JPEG with this shorter side, by bicubic interpolation with antialiasing.

    torch's kernel gives what Pillow's ``BICUBIC`` gives, to one grey level, in a fifth of its time.
    """
    import simplejpeg
    import torch

    pixels = decode_array(content, math.ceil(_SLACK * side))
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    size = [side if length == min(height, width) else round(scale * length) for length in (height, width)]
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(planes, size=size, mode="bicubic", antialias=True)
    pixels = np.ascontiguousarray(small[0].permute(1, 2, 0).numpy())
    encoded = simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")
    return ShardPicture("jpg", encoded, size[1], size[0])


def earlier_copies(hashes: Iterable[int | None], distance: int) -> dict[int, int]:
    """Which pictures look like an earlier one that is kept; the first in order stays.

    Two hashes that differ in at most ``distance`` bits agree in one of ``distance + 1`` pieces. As long as the pieces
    are long, each hash is compared with those alone that share a piece with it; else with all.

    Args:
        hashes: Of 64 bits; None: not compared.
        distance: Bits that may differ.

    Returns:
        The number of each copy -> that of the picture it looks like, the first of several.
    """
    pieces = distance + 1 if distance <= _MAX_PIECED else 0
    cuts = [(_HASH_BITS * i // pieces, _HASH_BITS * (i + 1) // pieces) for i in range(pieces)]
    buckets: list[dict[int, list[int]]] = [{} for _ in cuts]
    kept: list[int] = []  # the numbers of pictures that stay, in order
    kept_hashes = np.zeros(1024, dtype=np.uint64)
    copies: dict[int, int] = {}
    for number, own in enumerate(hashes):
        if own is None:
            continue
        keys = [own >> low & (1 << high - low) - 1 for low, high in cuts]
        if pieces:
            near = {place for bucket, key in zip(buckets, keys, strict=True) for place in bucket.get(key, ())}
            places = np.fromiter(sorted(near), np.int64, len(near))
            compared = kept_hashes[places]
        else:
            places, compared = None, kept_hashes[: len(kept)]
        alike = np.flatnonzero(np.bitwise_count(compared ^ np.uint64(own)) <= distance)
        if len(alike):
            copies[number] = kept[alike[0] if places is None else places[alike[0]]]
            continue
        for bucket, key in zip(buckets, keys, strict=True):
            bucket.setdefault(key, []).append(len(kept))
        if len(kept) == len(kept_hashes):
            kept_hashes = np.concatenate([kept_hashes, np.zeros_like(kept_hashes)])
        kept_hashes[len(kept)] = own
        kept.append(number)
    return copies
