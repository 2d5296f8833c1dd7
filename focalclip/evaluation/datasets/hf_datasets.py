"""What the library ``datasets`` saved with ``save_to_disk``, and Parquet files as hub repositories hold them.

One column holds images, one labels: class numbers whose names are stored with them (``ClassLabel``), lists of such
numbers (several labels per image), or the class names themselves. Images stay compressed until they are read.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from focalclip.errors import UserError, first_line
from focalclip.evaluation.datasets.records import SPLIT_WORDS, Split, TaskData, Unavailable, no_split, templates_of
from focalclip.evaluation.registry.tasks import Task

_LABEL_COLUMNS = ("label", "labels", "fine_label")


class RowEntry(NamedTuple):
    """An image in a row of a data set."""

    table: Any
    """``datasets.Dataset`` whose one column holds images that are not decoded."""
    row: int
    place: Path

    @property
    def key(self) -> str:
        """The row's number."""
        return str(self.row)

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.place}: row {self.row}"

    @property
    def file(self) -> None:
        """Unknown: the library keeps the rows in files of its own."""

    def read(self) -> bytes:
        """The compressed image, from the row or from the file that it names."""
        (image,) = self.table[self.row].values()
        if image is None:
            return b""
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def is_saved(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def parquet_splits(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files in or under a folder by split, told by a word in their path; without such a word: test."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        found.setdefault(_split_of(path.relative_to(folder)) or "test", []).append(path)
    return found


def read_saved(folder: Path, task: Task, split: Split) -> TaskData:
    """Read one split of what ``save_to_disk`` wrote; a data set without splits counts as test.

    Raises:
        Unavailable: if it has no such split, or the library is not installed.
        UserError: if its columns do not tell images and labels, or the task has no prompts.
    """
    library = _library()
    try:
        saved = library.load_from_disk(folder)
    except Exception as error:  # noqa: BLE001 - Arrow's and the library's errors share no base
        raise UserError(f"{folder}: cannot be read ({first_line(error)}); save it again") from None
    whole = {"test": saved} if isinstance(saved, library.Dataset) else {SPLIT_WORDS.get(n, n): saved[n] for n in saved}
    if split not in whole:
        raise no_split(folder, split, [] if isinstance(saved, library.Dataset) else list(whole))
    return _read(whole[split], folder, task)


def read_parquet(folder: Path, task: Task, split: Split) -> TaskData:
    """Read the Parquet files of one split.

    Raises:
        Unavailable: if it has no such split, or the library is not installed.
        UserError: if the files are of several configurations or damaged, their columns do not tell images and labels,
            or the task has no prompts.
    """
    library = _library()
    found = parquet_splits(folder)
    if split not in found:
        raise no_split(folder, split, list(found))
    configurations = sorted({_configuration(path.relative_to(folder)) for path in found[split]})
    if len(configurations) > 1:
        raise UserError(
            f"{folder} holds several data sets: {', '.join(configurations)}; give the folder of one of them"
        )
    try:
        table = library.Dataset.from_parquet([str(path) for path in found[split]])
    except Exception as error:  # noqa: BLE001 - Arrow's and the library's errors share no base
        raise UserError(f"{folder}: {found[split][0].name} ... cannot be read ({first_line(error)})") from None
    return _read(table, folder, task)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise Unavailable("needs the library datasets: pip install 'focalclip[shards]'") from None
    return datasets


def _split_of(path: Path) -> str | None:
    """The split that a word of the path names, the file's own words first."""
    for part in reversed(path.with_suffix("").parts):
        for word in part.lower().replace("-", "_").replace(".", "_").split("_"):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def _configuration(path: Path) -> str:
    """The folders of a Parquet file, but for those that name a split."""
    return "/".join(part for part in path.parent.parts if part.lower() not in SPLIT_WORDS) or "."


def _read(table: Any, folder: Path, task: Task) -> TaskData:
    image, label = _image_column(table, folder), _label_column(table, folder, task)
    class_names, labels = _labels(table, label, folder)
    pictures = table.select_columns([image]).cast_column(image, _library().Image(decode=False)).with_format(None)
    entries = tuple(RowEntry(pictures, row, folder) for row in range(len(table)))
    return TaskData(folder, class_names, templates_of(task, folder), entries, labels)


def _image_column(table: Any, folder: Path) -> str:
    library = _library()
    columns = [name for name, feature in table.features.items() if isinstance(feature, library.Image)]
    if not columns:  # Parquet that another program wrote: the same structure without its name
        columns = [name for name, kind in table.features.items() if isinstance(kind, dict) and "bytes" in kind]
    if len(columns) != 1:
        found = f"the columns {', '.join(columns)} hold images" if columns else "no column holds images"
        raise UserError(f"{folder}: {found} (of {', '.join(table.column_names)}); keep one such column")
    return columns[0]


def _label_column(table: Any, folder: Path, task: Task) -> str:
    """The column of class numbers with names; of several, the one with the task's number of classes."""
    named = {name: kind for name, feature in table.features.items() if (kind := _class_label(feature)) is not None}
    fitting = [name for name, kind in named.items() if kind.num_classes == task.classes] or list(named)
    if not fitting:
        texts = [name for name in _LABEL_COLUMNS if getattr(table.features.get(name), "dtype", None) == "string"]
        fitting = texts[:1]
    if len(fitting) == 1:
        return fitting[0]
    usual = [name for name in _LABEL_COLUMNS if name in fitting]
    if usual:
        return usual[0]
    raise UserError(
        f"{folder}: which of the columns {', '.join(table.column_names)} is the label cannot be told; it should be one"
        " 'label' of type ClassLabel, which stores the class names, or of class names"
    )


def _class_label(feature: Any) -> Any:
    """The ``ClassLabel`` of a column of numbers or of lists of numbers, else None."""
    kind = getattr(feature, "feature", feature)
    return kind if isinstance(kind, _library().ClassLabel) else None


def _labels(table: Any, column: str, folder: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and int64 (N,) or bool (N, C)."""
    feature, values = table.features[column], table.select_columns([column]).with_format(None)[:][column]
    kind = _class_label(feature)
    if any(value is None for value in values):
        raise UserError(f"{folder}: the column {column} has rows without a label; take them out")
    if kind is None:
        names = sorted(set(values))
        numbers = {name: number for number, name in enumerate(names)}
        return tuple(names), np.array([numbers[value] for value in values], dtype=np.int64)
    if kind is feature:
        return tuple(kind.names), np.array(values, dtype=np.int64)
    labels = np.zeros((len(values), kind.num_classes), dtype=bool)
    for row, present in zip(labels, values, strict=True):
        row[present] = True
    return tuple(kind.names), labels
