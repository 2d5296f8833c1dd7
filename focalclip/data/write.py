"""Write standard WebDataset shards and evaluation task folders, byte for byte the same for the same samples."""

import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from focalclip.base.errors import UserError, require
from focalclip.base.files import user_path, whole_file
from focalclip.data.images import SHARD_SUFFIXES, decode, image_format
from focalclip.data.reader import Entry, PictureSet

SHARDS_PER_TASK = 4  # clip_benchmark's loader has 4 workers by default and fails with fewer shards than workers


def write_shards(
    samples: Iterable[Mapping[str, Any]], folder: str | Path, samples_per_shard: int = 1024, name: str = "{:05d}.tar"
) -> int:
    """Write ``folder/00000.tar``, ``00001.tar`` ...

    Args:
        samples: Each maps member extensions (``png``, ``txt``, ``json``, ``cls`` ...) to bytes, or to what becomes
            bytes: text, an integer, or anything that JSON can say. ``__key__`` names the sample; without it the
            running number does.
        folder: Created if needed; a shard appears in it under its name only when it is complete.
        samples_per_shard: The last shard may hold fewer.
        name: Format of the shard names.

    Returns:
        The number of shards.

    Raises:
        UserError: if there are no samples.
    """
    require("writing shards", "train", "webdataset")
    import webdataset

    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbered = enumerate(samples)
    num_shards = 0
    while shard := list(itertools.islice(numbered, samples_per_shard)):
        path = folder / name.format(num_shards)
        with (
            whole_file(path) as temporary,
            temporary.open("wb") as file,
            # One owner, mode and time for all members: equal samples give equal files.
            webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False) as tar,
        ):
            for number, sample in shard:
                members = {kind: _to_bytes(value) for kind, value in sample.items() if kind != "__key__"}
                tar.write({"__key__": sample.get("__key__", f"{number:08d}"), **members})
        num_shards += 1
    if not num_shards:
        raise UserError(f"{folder}: no samples to write")
    return num_shards


def write_task(
    folder: str | Path,
    classnames: Sequence[str],
    templates: Sequence[str],
    samples: Sequence[tuple[bytes, int]],
    split: str = "test",
) -> None:
    """Write a classification task in the wds layout of CLIP_benchmark.

    Args:
        folder: The task's folder.
        classnames: Line ``i`` of ``classnames.txt`` names label ``i``.
        templates: Prompts with ``{c}`` where the class name goes.
        samples: PNG bytes and label of each picture.
        split: Subfolder of the shards.

    Raises:
        UserError: if there are no samples, a label has no name, or a template has no ``{c}``.
    """
    folder = user_path(folder)
    if bad := [label for _, label in samples if not 0 <= label < len(classnames)]:
        raise UserError(f"{folder}: label {bad[0]} has no line among the {len(classnames)} class names")
    if wrong := [template for template in templates if "{c}" not in template]:
        raise UserError(f"{folder}: template {wrong[0]!r} has no {{c}}, the place of the class name")
    pictures = ({"__key__": f"s{i:07d}", "png": png, "cls": label} for i, (png, label) in enumerate(samples))
    per_shard = max(1, -(-len(samples) // SHARDS_PER_TASK))
    num_shards = write_shards(pictures, folder / split, per_shard, name="{}.tar")
    (folder / split / "nshards.txt").write_text(f"{num_shards}\n")
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classnames))
    (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{template}\n" for template in templates))


def write_pictures(pictures: PictureSet, folder: str | Path, chosen: Sequence[int] | None = None) -> int:
    """Write pictures of a source as training shards, in their order; the compressed bytes are copied unchanged.

    Captions are the source's own (``txt`` holds the first, ``json`` all, and keywords where there are any). A source
    that has classes and no captions gets every prompt of a picture's classes, or the bare name where it has no prompts.
    Pictures of one class carry the same ``cls``; so do pictures with the same set of several labels. Pictures without
    any caption or label are left out. A format that shards do not hold becomes PNG.

    Args:
        pictures: What :func:`focalclip.data.sources.open_source` returned.
        folder: Where the shards go; must not hold any yet.
        chosen: Which of the pictures, by number; None for all.

    Returns:
        The number of pictures written.

    Raises:
        UserError: if ``folder`` holds shards, a picture is damaged, or none is left.
    """
    folder = user_path(folder)
    if any(folder.glob("*.tar")):
        raise UserError(f"{folder}: holds shards already; name another folder, or remove them")
    captions = captions_of(pictures)
    written = [i for i in (range(len(captions)) if chosen is None else chosen) if captions[i]]
    if not written:
        raise UserError(f"{pictures.place}: no picture with a caption or a label, so there is nothing to write")
    progress = tqdm(written, desc="writing shards", unit=" pictures", leave=False, disable=None)
    write_shards(_samples(pictures, captions, progress), folder)
    return len(written)


def captions_of(pictures: PictureSet) -> Sequence[Sequence[str]]:
    """All captions of each picture, or the prompts of its classes; empty where it has none.

    Raises:
        UserError: if the source has neither captions nor named classes.
    """
    if pictures.captions is not None:
        return pictures.captions
    labels, names = pictures.labels, pictures.class_names
    if labels is None or names is None:
        raise UserError(f"{pictures.place}: has neither captions nor named classes; add captions")
    prompts = [[template.replace("{c}", name) for template in pictures.templates or ("{c}",)] for name in names]
    classes = map(np.flatnonzero, labels) if labels.ndim == 2 else ([label] if label >= 0 else [] for label in labels)
    return [[prompt for label in own for prompt in prompts[label]] for own in classes]


def _samples(
    pictures: PictureSet, captions: Sequence[Sequence[str]], chosen: Iterable[int]
) -> Iterator[dict[str, Any]]:
    labels = pictures.labels
    if labels is not None and labels.ndim == 2:
        labels = np.unique(labels, axis=0, return_inverse=True)[1].ravel()
    for number, i in enumerate(chosen):
        extension, image = _image(pictures.entries[i])
        sample: dict[str, Any] = {"__key__": f"{number:08d}", extension: image}
        if pictures.captions is not None:
            sample["txt"] = captions[i][0]
        sample["json"] = {"captions": list(captions[i])}
        if pictures.keywords is not None and pictures.keywords[i]:
            sample["json"]["keywords"] = list(pictures.keywords[i])
        if labels is not None and labels[i] >= 0:
            sample["cls"] = int(labels[i])
        yield sample


def _image(entry: Entry) -> tuple[str, bytes]:
    """The picture unchanged where shards hold its format, else as PNG."""
    content = entry.read()
    try:
        picture = decode(content)
    except ValueError as error:
        raise UserError(f"{entry.name}: is damaged ({error}); repair it or take it out of the source") from None
    extension = SHARD_SUFFIXES.get(image_format(content) or "")
    if extension:
        return extension, content
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "png", buffer.getvalue()


def _to_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode()
