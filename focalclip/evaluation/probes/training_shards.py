"""A task's images as training shards: its prompts are the captions, its labels the classes of the contrastive loss."""

import io
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from focalclip.data.write import write_shards
from focalclip.errors import UserError
from focalclip.evaluation.datasets import Entry, TaskData, decode
from focalclip.evaluation.features.classifier import prompts_by_class

_MEMBERS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def write_training_shards(data: TaskData, indices: Sequence[int], folder: str | Path) -> int:
    """Write images with every prompt of their class as a caption, in the task's order.

    Images of one class carry the same ``cls``. So do images with the same set of several labels; those without any
    have nothing to be captioned with and are left out.

    Args:
        data: one split of a task.
        indices: which of its images.
        folder: where the shards go; must not hold any yet.

    Returns:
        The number of images written.

    Raises:
        UserError: if ``folder`` holds shards, an image is damaged, or none is left.
    """
    folder = Path(folder)
    if any(folder.glob("*.tar")):
        raise UserError(f"{folder}: holds shards already; name another folder, or remove them")
    chosen = [i for i in indices if not data.multilabel or data.labels[i].any()]
    write_shards(_samples(data, chosen), folder)
    return len(chosen)


def _samples(data: TaskData, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    groups = np.unique(data.labels, axis=0, return_inverse=True)[1].ravel() if data.multilabel else data.labels
    for number, i in enumerate(indices):
        extension, image = _image(data.entries[i])
        own = np.flatnonzero(data.labels[i]) if data.multilabel else [data.labels[i]]
        captions = list(chain.from_iterable(prompts_by_class([data.class_names[c] for c in own], data.templates)))
        sample = {extension: image, "json": {"captions": captions}, "cls": int(groups[i])}
        yield {"__key__": f"{number:08d}"} | sample


def _image(entry: Entry) -> tuple[str, bytes]:
    """The image as it is, where training reads its format, else as PNG."""
    content = entry.read()
    try:
        picture = decode(content)
    except ValueError as error:
        raise UserError(f"{entry.name}: is damaged ({error}); download the task again") from None
    with Image.open(io.BytesIO(content)) as image:
        extension = _MEMBERS.get(image.format or "")
    if extension:
        return extension, content
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "png", buffer.getvalue()
