"""Task folders in the wds layout of CLIP_benchmark.

classnames.txt                         one name per line; the line number is the label
zeroshot_classification_templates.txt  one prompt per line, {c} stands for the name
dataset_type.txt                       optional: "multilabel"
test/nshards.txt  test/0.tar ...       members KEY.webp|png|jpg|jpeg with KEY.cls (or KEY.npy, a 0/1 vector)
train/...  val/...                     other splits, where there are any; most mirrors have no val
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from focalclip.base.errors import UserError, first_line
from focalclip.evaluation.data.entries import SPLITS, TaskData
from focalclip.evaluation.data.trees import lines_of

NAMES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"

COUNT = "nshards.txt"

_IMAGES = ("webp", "png", "jpg", "jpeg")

_LABELS = ("cls", "npy")

_BLOCK = 512  # bytes of a tar block (POSIX ustar)


class TarEntry(NamedTuple):
    """An image that is a member of a tar."""

    shard: Path
    key: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """How messages call it: split, shard and key."""
        return f"{self.shard.parent.name}/{self.shard.name}:{self.key}"

    @property
    def file(self) -> Path:
        """The tar."""
        return self.shard

    def read(self) -> bytes:
        """The compressed image."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def is_task_folder(folder: Path) -> bool:
    """Whether a folder has this layout, be it whole or not."""
    return (folder / NAMES).is_file() or bool(splits(folder))


def splits(folder: Path) -> list[str]:
    """The splits that a task folder holds."""
    return [name for name in SPLITS if (folder / name / COUNT).is_file() or any((folder / name).glob("*.tar"))]


def is_whole(folder: Path) -> bool:
    """Whether a split's folder holds every shard that its nshards.txt counts."""
    return (folder / COUNT).is_file() and all(path.is_file() for path in _counted_shards(folder))


def read_task_folder(folder: Path, split: str = "test", *, empty_names: bool = False) -> TaskData:
    """Read names, prompts, labels and image positions of a task folder; ``empty_names``: a class may have no name.

    Raises:
        UserError: naming the file at fault: a missing or empty text file, a prompt without ``{c}``, a missing or broken
            shard, a sample without image or label, a label outside the classes.
    """
    class_names = _lines(folder / NAMES, "one class name per line", empty=empty_names)
    templates = _lines(folder / TEMPLATES, "one prompt per line with {c} for the class name")
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"{folder / TEMPLATES}: the prompt {template!r} has no {{c}} where the class name goes")
    kind = (_text(folder / TYPE) or "classification").strip()
    if kind == "retrieval":
        raise UserError(f"{folder}: a retrieval set, which has no classes; run eval/retrieval.py --data {folder}")
    if kind not in ("classification", "multilabel"):
        raise UserError(f"{folder / TYPE}: {kind!r} is neither classification nor multilabel; use another task")
    entries: list[TarEntry] = []
    labels: list[Any] = []
    for shard in _shards(folder / split):
        for entry, label in _scan(shard, len(class_names), multilabel=kind == "multilabel"):
            entries.append(entry)
            labels.append(label)
    if not entries:
        raise UserError(f"{folder / split}: the shards hold no images; download the task again")
    dtype = bool if kind == "multilabel" else np.int64
    return TaskData(folder, class_names, templates, tuple(entries), np.array(labels, dtype=dtype))


def _text(path: Path) -> str:
    """Empty where there is no such file; what is not UTF-8 fits none of the words that the file may hold."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _lines(path: Path, content: str, *, empty: bool = False) -> tuple[str, ...]:
    if not path.is_file():
        raise UserError(f"{path}: missing; a task folder needs it ({content})")
    return lines_of(path.read_bytes(), path, content, empty=empty)


def _shards(folder: Path) -> list[Path]:
    """The shards of a split, all of which are there."""
    shards = _counted_shards(folder)
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing ({missing[0]} ...); download again"
        )
    return shards


def _counted_shards(folder: Path) -> list[Path]:
    """Where 0.tar, 1.tar ... belong, as many as nshards.txt says."""
    count_file = folder / COUNT
    text = _text(count_file).strip() if count_file.is_file() else str(len(list(folder.glob("*.tar"))))
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{folder}: no shards; expected {folder.name}/0.tar ... and {folder.name}/{COUNT}")
    return [folder / f"{i}.tar" for i in range(int(text))]


def _scan(shard: Path, num_classes: int, multilabel: bool) -> Iterator[tuple[TarEntry, Any]]:
    """Image positions and labels of one shard, in its order."""
    kind = "npy" if multilabel else "cls"
    samples = _samples(shard)
    with shard.open("rb") as data:
        for key, members in samples:
            image = next((members[extension] for extension in _IMAGES if extension in members), None)
            if image is None or kind not in members:
                lacks = f"no image ({', '.join(_IMAGES)})" if image is None else f"no .{kind} label"
                raise UserError(f"{shard}: the sample {key} has {lacks}; write the shard again")
            data.seek(members[kind].offset_data)
            label = _label(data.read(members[kind].size), num_classes, multilabel, f"{shard}: the label of {key}")
            yield TarEntry(shard, key, image.offset_data, image.size), label


def _samples(shard: Path) -> list[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Key and members by extension of each sample: a run of members that share a key, which ends at the first dot."""
    samples: list[tuple[str, dict[str, tarfile.TarInfo]]] = []
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, slash, base = member.name.removeprefix("./").rpartition("/")
                stem, _, extension = base.lower().partition(".")
                if not member.isreg() or extension not in _IMAGES + _LABELS:
                    continue
                key = folder + slash + base[: len(stem)]
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                samples[-1][1][extension] = member
            file.seek(tar.offset)
            end = file.read(_BLOCK)
    except tarfile.TarError as error:
        raise UserError(f"{shard}: not a whole tar ({error}); download the shard again") from None
    if len(end) < _BLOCK or any(end):  # tarfile stops without a word at a header that is cut short
        raise UserError(f"{shard}: cut short or damaged at byte {tar.offset}; download the shard again")
    return samples


def _label(data: bytes, num_classes: int, multilabel: bool, what: str) -> Any:
    if multilabel:
        try:
            vector = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{what} is not a .npy vector ({first_line(error)}); write the shard again") from None
        if vector.shape != (num_classes,) or not np.isin(vector, (0, 1)).all():
            raise UserError(f"{what} is not a vector of {num_classes} zeros and ones; is {NAMES} of the same task?")
        return vector.astype(bool)
    text = data.decode("ascii", errors="replace").strip()
    if not text.isdecimal() or int(text) >= num_classes:
        raise UserError(f"{what} is {text!r}, not one of 0 to {num_classes - 1}; is {NAMES} of the same task?")
    return int(text)
