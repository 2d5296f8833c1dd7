"""Images to unit vectors: threads read and decode, the model encodes."""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from focalclip.errors import UserError
from focalclip.evaluation.datasets import Entry, decode
from focalclip.evaluation.model import device_and_dtype
from focalclip.evaluation.protocols import Resize
from focalclip.evaluation.resize import resizer

MAX_THREADS = 16


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


class _Batch(NamedTuple):
    images: list[Tensor]
    readable: list[bool]
    broken: list[str]
    digests: list[bytes]


def encode_images(
    model: Any,
    entries: Sequence[Entry],
    *,
    batch_size: int,
    resize: Resize = "model",
    label: str = "",
    progress: bool = True,
) -> ImageFeatures:
    """Encode images in order; a damaged one is left out and named.

    Raises:
        UserError: if no image can be read, or the model's features are not finite.
    """
    start = time.perf_counter()
    device, dtype = device_and_dtype(model)
    embeds, readable, broken, digest = [], [], [], hashlib.sha256()
    blocks = [entries[i : i + batch_size] for i in range(0, len(entries), batch_size)]
    bar = tqdm(total=len(entries), desc=label, unit=" images", leave=False, disable=None if progress else True)
    with bar:
        # On a CPU the model wants the cores to itself; beside a GPU the next batch is made ready meanwhile.
        for batch in _prefetch(_loader(model.preprocess, resize), blocks, ahead=0 if device.type == "cpu" else 1):
            if batch.images:
                features = model.encode_image(torch.stack(batch.images).to(device, dtype)).float().cpu()
                embeds.append(F.normalize(features, dim=-1))
            readable += batch.readable
            broken += batch.broken
            digest.update(b"".join(batch.digests))
            bar.update(len(batch.readable))
    if not embeds:
        raise UserError(f"none of the {len(entries):,} images can be read ({broken[0]})")
    matrix = torch.cat(embeds)
    if not bool(torch.isfinite(matrix).all()):
        raise UserError("the model's image features hold NaN or infinity; evaluate weights from before the divergence")
    seconds = time.perf_counter() - start
    return ImageFeatures(matrix, np.array(readable), tuple(broken), digest.hexdigest(), seconds)


def _loader(preprocess: Callable[[Image.Image], Tensor], resize: Resize) -> Callable[[Sequence[Entry]], _Batch]:
    """A function that reads, checks, decodes and preprocesses some images."""
    resized = resizer(preprocess, resize)

    def load(entries: Sequence[Entry]) -> _Batch:
        images, readable, broken, digests = [], [], [], []
        for entry in entries:
            data = entry.read()
            digests.append(hashlib.sha256(data).digest())
            try:
                image = decode(data)
            except ValueError as error:
                broken.append(f"{entry.name} ({error})")
                readable.append(False)
                continue
            images.append(preprocess(resized(image)))
            readable.append(True)
        return _Batch(images, readable, broken, digests)

    return load


def _prefetch(
    load: Callable[[Sequence[Entry]], _Batch], blocks: Sequence[Sequence[Entry]], ahead: int
) -> Iterator[_Batch]:
    """Batches in order, each split over all threads, with ``ahead`` more of them in work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(MAX_THREADS, cores)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[list[Future[_Batch]]] = deque()
        for block in blocks:
            share = -(-len(block) // threads)
            waiting.append([pool.submit(load, block[i : i + share]) for i in range(0, len(block), share)])
            if len(waiting) > ahead:
                yield _join([future.result() for future in waiting.popleft()])
        for futures in waiting:
            yield _join([future.result() for future in futures])


def _join(parts: Sequence[_Batch]) -> _Batch:
    """One batch from its shares, in order."""
    whole = _Batch([], [], [], [])
    for part in parts:
        whole.images.extend(part.images)
        whole.readable.extend(part.readable)
        whole.broken.extend(part.broken)
        whole.digests.extend(part.digests)
    return whole
