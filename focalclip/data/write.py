"""Write standard WebDataset shards and evaluation task folders, byte for byte the same for the same samples."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import webdataset

from focalclip.base.errors import UserError

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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbered = enumerate(samples)
    num_shards = 0
    while shard := list(itertools.islice(numbered, samples_per_shard)):
        path = folder / name.format(num_shards)
        partial = path.with_name(path.name + ".partial")
        # One owner, mode and time for all members: equal samples give equal files.
        with partial.open("wb") as file, webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
            for number, sample in shard:
                members = {extension: _to_bytes(value) for extension, value in sample.items() if extension != "__key__"}
                tar.write({"__key__": sample.get("__key__", f"{number:08d}"), **members})
        partial.rename(path)
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
    folder = Path(folder)
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


def _to_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode()
