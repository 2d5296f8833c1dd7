"""Readers of evaluation data: task folders in the wds layout of CLIP_benchmark, local or from the Hugging Face hub.

    classnames.txt                         one name per line; the line number is the label
    zeroshot_classification_templates.txt  one prompt per line, {c} stands for the name
    dataset_type.txt                       optional: "multilabel"
    test/nshards.txt  test/0.tar ...       members KEY.webp|png|jpg|jpeg with KEY.cls (or KEY.npy, a 0/1 vector)

Every header and label is read before the first image is encoded, so that faulty data costs seconds, not minutes.
"""

import hashlib
import io
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from focalclip.errors import UserError
from focalclip.evaluation.tasks import Task

NAMES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
_IMAGES = ("webp", "png", "jpg", "jpeg")
_LABELS = ("cls", "npy")
_BLOCK = 512  # bytes of a tar block (POSIX ustar)


class Entry(NamedTuple):
    """Where one image lies."""

    shard: Path
    key: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """How messages call it: split, shard and key."""
        return f"{self.shard.parent.name}/{self.shard.name}:{self.key}"

    def read(self) -> bytes:
        """The compressed image."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class TaskData:
    """One split of a task folder: names, prompts, labels, and where the images lie."""

    folder: Path
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    entries: tuple[Entry, ...]
    labels: np.ndarray
    """int64 (N,), or bool (N, C) for multi-label data."""

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.ndim == 2

    def digest(self, images_sha256: str) -> str:
        """SHA-256 of everything that decides a result: names, prompts, keys, labels and the images' own digest."""
        keys = [entry.key for entry in self.entries]
        parts = ["\n".join(lines).encode() for lines in (self.class_names, self.templates, keys)]
        return hashlib.sha256(b"\0".join([*parts, self.labels.tobytes(), images_sha256.encode()])).hexdigest()


class Unavailable(Exception):
    """A task's data is not there; the message says what to do."""


def locate(task: Task, data_root: Path | None, absent: dict[str, str]) -> Path:
    """Folder of the task's data: under ``data_root``, or from the hub where there is none.

    Raises:
        Unavailable: saying what to do.
    """
    if data_root is None:
        return _download(task)
    found = task.find(data_root)
    if found is not None:
        return found
    if task.id in absent:
        raise Unavailable(absent[task.id])
    wanted = data_root / task.folder_names[0]
    if task.hub is None:
        raise Unavailable(f"needs {wanted}; {task.obtain or 'put the task folder there'}")
    raise Unavailable(f"needs {wanted}; on the hub: {task.hub}")


def _download(task: Task) -> Path:
    if task.hub is None:
        raise Unavailable(f"on no hub; {task.obtain or 'put its folder somewhere'}, then give --data-root")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(task.hub, repo_type="dataset", allow_patterns=["*.txt", "test/*"]))
    except GatedRepoError:
        raise Unavailable(f"{task.hub} is gated: accept its terms on the hub and log in, or give --data-root") from None
    except RepositoryNotFoundError:
        raise Unavailable(f"the hub has no {task.hub} (any more); give --data-root") from None
    except LocalEntryNotFoundError:
        raise Unavailable(f"offline, {task.hub} not cached; go online once, or give --data-root") from None
    except Exception as error:  # noqa: BLE001 - the client's network, disk and Xet errors share no base
        raise Unavailable(f"{task.hub}: {_brief(error)}; try again, or give --data-root") from None


def read_task_folder(folder: Path, split: str = "test") -> TaskData:
    """Read names, prompts, labels and image positions of a task folder.

    Raises:
        UserError: naming the file at fault: a missing or empty text file, a prompt without ``{c}``, a missing or broken
            shard, a sample without image or label, a label outside the classes.
    """
    class_names = _lines(folder / NAMES, "one class name per line")
    templates = _lines(folder / TEMPLATES, "one prompt per line with {c} for the class name")
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"{folder / TEMPLATES}: the prompt {template!r} has no {{c}} where the class name goes")
    kind = (folder / TYPE).read_text().strip() if (folder / TYPE).is_file() else "classification"
    if kind not in ("classification", "multilabel"):
        raise UserError(f"{folder / TYPE}: {kind!r} is neither classification nor multilabel; use another task")
    entries: list[Entry] = []
    labels: list[Any] = []
    for shard in _shards(folder / split):
        for entry, label in _scan(shard, len(class_names), multilabel=kind == "multilabel"):
            entries.append(entry)
            labels.append(label)
    if not entries:
        raise UserError(f"{folder / split}: the shards hold no images; download the task again")
    dtype = bool if kind == "multilabel" else np.int64
    return TaskData(folder, class_names, templates, tuple(entries), np.array(labels, dtype=dtype))


def decode(data: bytes) -> Image.Image:
    """Decode an image to RGB with Pillow, as the other harnesses do.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(_brief(error)) from None


def _lines(path: Path, content: str) -> tuple[str, ...]:
    if not path.is_file():
        raise UserError(f"{path}: missing; a task folder needs it ({content})")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not all(lines):
        raise UserError(f"{path}: line {lines.index('') + 1} is empty; expected {content}")
    return tuple(lines)


def _shards(folder: Path) -> list[Path]:
    """The shards 0.tar, 1.tar ... as many as nshards.txt says."""
    count_file = folder / "nshards.txt"
    present = {path.name for path in folder.glob("*.tar")}
    text = count_file.read_text().strip() if count_file.is_file() else str(len(present))
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{folder}: no shards; expected {folder.name}/0.tar ... and {folder.name}/nshards.txt")
    expected = [f"{i}.tar" for i in range(int(text))]
    missing = [name for name in expected if name not in present]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(expected)} shards are missing ({missing[0]} ...); download again"
        )
    return [folder / name for name in expected]


def _scan(shard: Path, num_classes: int, multilabel: bool) -> Iterator[tuple[Entry, Any]]:
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
            yield Entry(shard, key, image.offset_data, image.size), label


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
            raise UserError(f"{what} is not a .npy vector ({_brief(error)}); write the shard again") from None
        if vector.shape != (num_classes,) or not np.isin(vector, (0, 1)).all():
            raise UserError(f"{what} is not a vector of {num_classes} zeros and ones; is {NAMES} of the same task?")
        return vector.astype(bool)
    text = data.decode("ascii", errors="replace").strip()
    if not text.isdecimal() or int(text) >= num_classes:
        raise UserError(f"{what} is {text!r}, not one of 0 to {num_classes - 1}; is {NAMES} of the same task?")
    return int(text)


def _brief(error: Exception) -> str:
    """First line of a message, without the address of the buffer that Pillow read from."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return str(error).strip().split("\n")[0] or type(error).__name__
