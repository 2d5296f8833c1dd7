"""Images to unit vectors: threads read and decode, the model encodes, ranks share the work.

A data set is cut into batches, always at the same places, and a rank takes whole batches; so the numbers do not depend
on how many ranks there are or which batches come from the cache (only the batch size can change a feature's last bits).
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from focalclip.base.errors import UserError, faults_named, unforeseen
from focalclip.base.machine import num_cores
from focalclip.base.ranks import (
    gather_objects,
    is_main,
    main_only,
    own_share,
    ranks_on_this_machine,
    together,
    world_size,
)
from focalclip.evaluation.data import Entry, decode
from focalclip.evaluation.features.cache import FeatureCache
from focalclip.evaluation.features.model import device_and_dtype
from focalclip.evaluation.protocols import Resize

MAX_THREADS = 16

UNICL_RATIO = 256 / 224  # TEST.CROP in data/build.py of microsoft/UniCL

S = TypeVar("S")

T = TypeVar("T")


def resizer(preprocess: Callable[[Image.Image], Tensor], resize: Resize) -> Callable[[Image.Image], Image.Image]:
    """A function that resizes a picture (bicubic) to the output size of ``preprocess``, by the rule ``resize``.

    ``model`` does nothing. ``squash`` keeps the whole picture and not its proportions (ELEVATER's KITTI).
    ``resize256_crop224`` resizes the shorter side to int(256/224 x side), then crops the centre (UniCL's ImageNet).
    """
    if resize == "model":
        return lambda image: image
    size = list(preprocess(Image.new("RGB", (32, 32))).shape[-2:])
    bicubic = v2.InterpolationMode.BICUBIC
    if resize == "squash":
        return v2.Resize(size, bicubic)
    return v2.Compose([v2.Resize(int(UNICL_RATIO * min(size)), bicubic), v2.CenterCrop(size)])


@dataclass(frozen=True)
class ImageFeatures:
    """What became of a task's images."""

    embeds: Tensor
    """float32 (N, D) on the CPU, unit length, one row per readable image."""
    readable: np.ndarray
    """bool (entries,): which entries have a row."""
    broken: tuple[str, ...]
    """The others by name, each with the reason."""
    sha256: str
    """Of the compressed images, in order."""
    seconds: float
    num_cached: int = 0
    """Images that were not encoded but remembered."""


class _Loaded(NamedTuple):
    """One image, read."""

    image: Tensor | None
    """Preprocessed; None where it cannot be decoded."""
    reason: str
    """Why it cannot be decoded, else empty."""
    digest: bytes
    """SHA-256 of the compressed image."""


class _Done(NamedTuple):
    """A batch that the model has seen, as ranks and the cache pass it on."""

    embeds: np.ndarray
    reasons: list[str]
    digests: list[bytes]
    was_cached: bool


def encode_images(
    model: Any,
    entries: Sequence[Entry],
    *,
    batch_size: int,
    resize: Resize = "model",
    label: str = "",
    progress: bool = True,
    cache: FeatureCache | None = None,
    upright: bool = True,
) -> ImageFeatures:
    """Encode images in order; a damaged one is left out and named. All ranks call this together.

    Args:
        model: in evaluation mode, without gradients (see ``model.evaluating``).
        entries: where the images are.
        batch_size: images per forward pass.
        resize: ``squash`` resizes the whole picture to the model's square before the model's own preprocessing.
        label: what the progress bar says.
        progress: show it.
        cache: where features are looked up by content, and stored.
        upright: turn pictures as their EXIF orientation says.

    Raises:
        UserError: if no image can be read, or the model's features are not finite.
    """
    start = time.perf_counter()
    blocks = [entries[i : i + batch_size] for i in range(0, len(entries), batch_size)]
    known, encoder = together(
        lambda: faults_named(
            lambda: (cache.digests(entries) if cache else None, _ImageEncoder(model, resize, upright, cache))
        )
    )
    digests = [known and known[i : i + batch_size] for i in range(0, len(entries), batch_size)]
    mine = list(own_share(len(blocks)))
    bar = _bar(sum(len(blocks[i]) for i in mine), label, progress)
    with bar:
        own = together(
            lambda: faults_named(lambda: dict(zip(mine, encoder.run(blocks, digests, mine, bar), strict=True)))
        )
    by_block = {i: done for share in gather_objects(own) for i, done in share.items()}
    done = [by_block[i] for i in range(len(blocks))]
    if cache:
        hashes = [digest for block in done for digest in block.digests]
        main_only(lambda: cache.keep_digests(entries, hashes) if known is None else None)
    return _whole(done, entries, time.perf_counter() - start)


def images_sha256(entries: Sequence[Entry], cache: FeatureCache | None = None, label: str = "") -> str:
    """:attr:`ImageFeatures.sha256` without decoding; read from the files only where the cache does not know it."""
    digests = cache.digests(entries) if cache else None
    if digests is None:
        digests = []
        with ThreadPoolExecutor(num_threads()) as pool, _bar(len(entries), label, progress=bool(label)) as bar:
            for digest in pool.map(_digest, entries):
                digests.append(digest)
                bar.update()
        if cache:
            cache.keep_digests(entries, digests)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _whole(done: Sequence[_Done], entries: Sequence[Entry], seconds: float) -> ImageFeatures:
    """The batches of all ranks as one."""
    reasons = [reason for block in done for reason in block.reasons]
    broken = [f"{entry.name} ({reason})" for entry, reason in zip(entries, reasons, strict=True) if reason]
    if len(broken) == len(entries):
        raise UserError(f"none of the {len(entries):,} images can be read ({broken[0]}); download the data again")
    digest = hashlib.sha256(b"".join(digest for block in done for digest in block.digests))
    return ImageFeatures(
        embeds=torch.from_numpy(np.concatenate([block.embeds for block in done if len(block.embeds)])),
        readable=np.array([not reason for reason in reasons]),
        broken=tuple(broken),
        sha256=digest.hexdigest(),
        seconds=seconds,
        num_cached=sum(len(block.reasons) for block in done if block.was_cached),
    )


class _ImageEncoder:
    """One rank's work on a data set."""

    def __init__(self, model: Any, resize: Resize, upright: bool, cache: FeatureCache | None) -> None:
        self.model, self.cache = model, cache
        self.rule = resize if upright else f"{resize}, as stored"
        self.device, self.dtype = device_and_dtype(model)
        self.load = _loader(model.preprocess, resize, upright)

    def run(
        self, blocks: Sequence[Sequence[Entry]], digests: Sequence[list[bytes] | None], mine: Sequence[int], bar: tqdm
    ) -> list[_Done]:
        """The batches ``mine``, in order: first what the cache has, then the rest through the model."""
        done: dict[int, _Done] = {}
        with ThreadPoolExecutor(num_threads()) as pool:
            for i in mine:
                if self.cache is None or (digests[i] is None and self.cache.is_new):
                    continue  # the cache is empty: images are hashed as they are loaded, not before
                if found := self._cached(digests[i] or list(pool.map(_digest, blocks[i]))):
                    done[i] = found
                    bar.update(len(blocks[i]))
            rest = [i for i in mine if i not in done]
            for i, batch in zip(rest, prefetch(pool, self.load, [blocks[i] for i in rest], self.device), strict=True):
                done[i] = self._encode(batch)
                bar.update(len(blocks[i]))
        return [done[i] for i in mine]

    def _cached(self, digests: list[bytes]) -> _Done | None:
        assert self.cache is not None
        arrays = self.cache.get(self.cache.images_key(digests, self.rule))
        if arrays is None:
            return None
        return _Done(arrays["embeds"], arrays["reasons"].tolist(), digests, was_cached=True)

    def _encode(self, batch: Sequence[_Loaded]) -> _Done:
        images = [loaded.image for loaded in batch if loaded.image is not None]
        reasons, digests = [loaded.reason for loaded in batch], [loaded.digest for loaded in batch]
        embeds = np.empty((0, 0), np.float32)
        if images:
            features = self.model.encode_image(torch.stack(images).to(self.device, self.dtype))
            embeds = F.normalize(features.float().cpu(), dim=-1).numpy()
        if not np.isfinite(embeds).all():
            raise UserError(
                "the model's image features hold NaN or infinity; evaluate weights from before the divergence"
            )
        if self.cache:
            key = self.cache.images_key(digests, self.rule)
            self.cache.put(key, embeds=embeds, reasons=np.array(reasons))
        return _Done(embeds, reasons, digests, was_cached=False)


def _loader(preprocess: Callable[[Image.Image], Tensor], resize: Resize, upright: bool) -> Callable[[Entry], _Loaded]:
    """A function that reads, hashes, decodes and preprocesses one image; what a batch cannot hold is not readable."""
    resized = resizer(preprocess, resize)
    shape = preprocess(Image.new("RGB", (32, 32))).shape

    def load(entry: Entry) -> _Loaded:
        data = entry.read()
        digest = hashlib.sha256(data).digest()
        try:
            image = decode(data, upright=upright)
        except ValueError as error:
            return _Loaded(None, str(error) or "damaged", digest)
        try:
            pixels = preprocess(resized(image))
        except Exception as error:  # noqa: BLE001 (a user's code, which has done well with other pictures)
            return _Loaded(None, f"the model's preprocess fails, {unforeseen(error)}", digest)
        if pixels.shape != shape:
            reason = f"the model's preprocess gives {tuple(pixels.shape)}, not {tuple(shape)}"
            return _Loaded(None, reason, digest)
        return _Loaded(pixels, "", digest)

    return load


def prefetch(
    pool: ThreadPoolExecutor, load: Callable[[S], T], batches: Sequence[Sequence[S]], device: torch.device
) -> Iterator[list[T]]:
    """What ``load`` returns for each element, batch by batch in order; each batch is divided among all threads.

    Beside a GPU the next batch is loaded while the model computes; on a CPU the model gets the cores to itself.

    Args:
        pool: of :func:`num_threads` threads.
        load: called in the threads; what it raises is raised here.
        batches: their elements are what ``load`` takes.
        device: where the model computes.
    """
    ahead = 0 if device.type == "cpu" else 1
    waiting: deque[list[Future[list[T]]]] = deque()

    def load_all(elements: Sequence[S]) -> list[T]:
        return [load(element) for element in elements]

    for batch in batches:
        share = -(-len(batch) // num_threads())
        waiting.append([pool.submit(load_all, batch[i : i + share]) for i in range(0, len(batch), share)])
        if len(waiting) > ahead:
            yield [loaded for future in waiting.popleft() for loaded in future.result()]
    for futures in waiting:
        yield [loaded for future in futures for loaded in future.result()]


def _digest(entry: Entry) -> bytes:
    return hashlib.sha256(entry.read()).digest()


def num_threads() -> int:
    """Threads that read and decode images in this process: its share of the cores, ``MAX_THREADS`` at most."""
    return max(1, min(MAX_THREADS, num_cores() // ranks_on_this_machine()))


def _bar(total: int, label: str, progress: bool) -> tqdm:
    """Progress bar of the main rank, over its share of the images."""
    if world_size() > 1:
        label = f"{label}, 1 of {world_size()} ranks"
    return tqdm(total=total, desc=label, unit=" images", leave=False, disable=None if progress and is_main() else True)
