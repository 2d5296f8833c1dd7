"""Parquet files and data sets of the library ``datasets``: rows whose pictures are bytes, read when they are asked for.

FILE.parquet, or a folder of them   a column of bytes (or of ``{bytes, path}``, as ``datasets`` writes it), or of paths
a folder of ``save_to_disk``        ``Dataset`` or ``DatasetDict``
datasets:NAME                       what ``load_dataset`` finds: a data set of the hub
datasets:imagefolder:FOLDER         one of its builders with a folder
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from focalclip.base.errors import UserError, first_line, require
from focalclip.base.files import user_path
from focalclip.data.reader import (
    NO_LABEL,
    SPLIT_WORDS,
    Entry,
    FileEntry,
    PictureSet,
    Reader,
    Request,
    data_in,
    no_split,
)
from focalclip.data.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, refuse_urls

BYTES_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes", "bytes")

LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category")

_PREFIX = "datasets:"


class ParquetEntry(NamedTuple):
    """A picture in a column of a Parquet file."""

    path: Path
    group: int
    row: int
    column: str

    @property
    def key(self) -> str:
        """File, row group and row."""
        return f"{self.path.name}/{self.group}/{self.row}"

    @property
    def name(self) -> str:
        """File, row group and row, in words."""
        return f"{self.path}: row {self.row} of row group {self.group}"

    @property
    def file(self) -> Path:
        """The Parquet file."""
        return self.path

    def read(self) -> bytes:
        """The compressed picture; of all pictures, those of one row group are in memory."""
        return _content(_row_group(self.path, self.group, self.column)[self.row].as_py())


class DatasetEntry(NamedTuple):
    """A picture of a data set of the library ``datasets``, whose files are mapped into memory."""

    rows: Any
    row: int
    column: str
    file: Path | None

    @property
    def key(self) -> str:
        """The number of the row."""
        return str(self.row)

    @property
    def name(self) -> str:
        """File and row."""
        return f"{self.file or 'the data set'}: row {self.row}"

    def read(self) -> bytes:
        """The compressed picture."""
        return _content(self.rows[self.row][self.column])


@lru_cache(maxsize=1)
def _row_group(path: Path, group: int, column: str) -> Any:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column], use_threads=False)[column]


def _content(value: Any) -> bytes:
    """Bytes of a cell; a ``{bytes, path}`` without bytes names a file. Empty where there is nothing."""
    if not isinstance(value, dict):
        return value or b""
    if value.get("bytes") or not value.get("path"):
        return value.get("bytes") or b""
    path = Path(value["path"])
    return path.read_bytes() if path.is_file() else b""


class _Columns(NamedTuple):
    """The columns of a table that are read."""

    image: str
    captions: list[str]
    label: str | None

    @property
    def texts(self) -> list[str]:
        return [*self.captions, *([self.label] if self.label else [])]


def _columns(what: str, names: Sequence[str], with_bytes: Sequence[str], request: Request) -> _Columns:
    """Which columns hold pictures, captions and labels, as requested or by their names.

    Args:
        what: The source in messages.
        names: All columns.
        with_bytes: Those of a type that holds bytes.
        request: Names that the user gave.
    """
    given = [request.image_column, *request.caption_columns, request.label_column]
    if unknown := [name for name in given if name and name not in names]:
        raise UserError(f"{what}: has no column {unknown[0]!r}; it has {', '.join(names)}")
    known_bytes = [name for name in with_bytes if name.lower() in BYTES_COLUMNS]
    paths = [name for name in names if name not in with_bytes and name.lower() in IMAGE_COLUMNS]
    images = [request.image_column] if request.image_column else known_bytes or list(with_bytes) or paths
    captions = [name for name in names if name.lower() in CAPTION_COLUMNS and name not in images]
    labels = [name for name in names if name.lower() in LABEL_COLUMNS]
    if not images:
        refuse_urls(what, names)
    for option, found, wanted in (
        ("--image-column", images, BYTES_COLUMNS),
        ("--caption-column", [] if request.caption_columns or not captions else captions, CAPTION_COLUMNS),
    ):
        if len(found) > 1:
            raise UserError(f"{what}: the columns {', '.join(found)} may all be meant; say which with {option}")
        if not found and option == "--image-column":
            raise UserError(
                f"{what}: has the columns {', '.join(names)}, and none is called {' or '.join(wanted)}; "
                f"say which with {option}"
            )
    label = request.label_column or (labels[0] if len(labels) == 1 else None)
    texts = list(request.caption_columns) or captions
    if not texts and label is None:
        raise UserError(
            f"{what}: has the columns {', '.join(names)}, none of them with captions or labels by its name; say which "
            "with --caption-column or --label-column"
        )
    return _Columns(images[0], texts, label)


def _picture_set(
    place: Path,
    entries: Sequence[Entry],
    columns: _Columns,
    cells: dict[str, list[Any]],
    label_names: Sequence[str] | None,
    request: Request,
) -> PictureSet:
    """Captions and labels of the rows."""
    captions = None
    if columns.captions:
        rows = zip(*(cells[name] for name in columns.captions), strict=True)
        captions = tuple(tuple(text for cell in row for text in _texts(place, cell)) for row in rows)
    labels = names = None
    if columns.label:
        values = cells[columns.label]
        if label_names is None and any(isinstance(value, str) for value in values):
            label_names = sorted({str(value) for value in values if value is not None})
            numbers = {name: number for number, name in enumerate(label_names)}
            values = [None if value is None else numbers[str(value)] for value in values]
        if any(not isinstance(value, int | None) for value in values):
            raise UserError(f"{place}: the column {columns.label} holds neither numbers nor names; use another")
        if label_names is None and captions is None:
            raise UserError(
                f"{place}: the labels of the column {columns.label} are numbers without names; name a column of names "
                "with --label-column, or of captions with --caption-column"
            )
        labels = np.array([NO_LABEL if value is None else value for value in values], dtype=np.int64)
        if label_names is not None and len(labels) and labels.max() >= len(label_names):
            raise UserError(f"{place}: the label {labels.max()} of the column {columns.label} has no name; correct it")
        names = None if label_names is None else tuple(label_names)
        if names is None:
            labels = None  # numbers that nothing names would match those of any other source
    return PictureSet(
        place, tuple(entries), place.stem, captions, labels=labels, class_names=names,
        templates=request.templates or None,
    )  # fmt: skip


def _texts(place: Path, cell: Any) -> Iterable[str]:
    values = cell if isinstance(cell, list) else [cell]
    if wrong := [value for value in values if isinstance(value, dict | list | bytes)]:
        raise UserError(f"{place}: the caption {str(wrong[0])[:40]} is not text; name another --caption-column")
    return ["" if value is None else re.sub(r"\s+", " ", str(value)) for value in values]


# Parquet


def _parquet_files(source: str) -> list[Path]:
    path = user_path(source)
    if path.is_dir():
        return data_in(path, ".parquet") or data_in(path / "data", ".parquet")
    return [path] if path.suffix.lower() == ".parquet" else []


def _open_parquet(source: str, request: Request) -> PictureSet:
    require(f"{request.field} {source}", "shards", "pyarrow")
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    place = user_path(source)
    entries: list[Entry] = []
    cells: dict[str, list[Any]] = {}
    columns, names = None, None
    for path in _of_split(source, _parquet_files(source), request):
        try:
            with ParquetFile(path) as file:
                schema = file.schema_arrow
                bytes_columns = [field.name for field in schema if _holds_bytes(field.type)]
                found = _columns(f"{request.field} {path}", schema.names, bytes_columns, request)
                if columns is not None and found != columns:
                    raise UserError(f"{path}: other columns than the files before it; name files of one kind")
                columns, names = found, _names_in(schema, found.label)
                for group in range(file.num_row_groups):
                    if found.image in bytes_columns:
                        count = file.metadata.row_group(group).num_rows
                        entries += [ParquetEntry(path, group, row, found.image) for row in range(count)]
                        wanted = found.texts
                    else:
                        wanted = [found.image, *found.texts]
                    read = file.read_row_group(group, columns=wanted, use_threads=False)
                    for name in wanted:
                        cells.setdefault(name, []).extend(read[name].to_pylist())
        except FileNotFoundError:
            raise UserError(f"{request.field} {path}: no such file") from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: not a Parquet file that can be read ({first_line(error)}); write it again"
            ) from None
    if columns is None or not (entries or cells.get(columns.image)):
        raise UserError(f"{request.field} {source}: holds no rows; name a file that does")
    if not entries:
        root = request.image_root or (place if place.is_dir() else place.parent)
        files = [root / str(name).replace("\\", "/") for name in cells[columns.image]]
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(
                f"{request.field} {source}: {len(missing):,} of {len(files):,} images are not there (the first: "
                f"{missing[0]}); say with --image-root what the paths are relative to"
            )
        entries = [FileEntry(file, str(name)) for file, name in zip(files, cells[columns.image], strict=True)]
    return _picture_set(place, entries, columns, cells, names, request)


def _of_split(source: str, files: list[Path], request: Request) -> list[Path]:
    """The files of the split; all of them where their names say none, as in ``train-00000-of-00002.parquet``."""
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(SPLIT_WORDS.get(re.split(r"[-_.]", path.name.lower())[0], ""), []).append(path)
    if user_path(source).is_file() or set(splits) == {""}:
        return files
    split = request.split or "train"
    if split not in splits:
        raise no_split(source, split, sorted(filter(None, splits)))
    return splits[split]


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def _names_in(schema: Any, label: str | None) -> list[str] | None:
    """The names of a ``ClassLabel`` that ``datasets`` notes in its Parquet files."""
    try:
        return json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None


PARQUET = Reader(
    "Parquet (.parquet, or a folder of them), with pictures as bytes or as paths",
    lambda source: bool(_parquet_files(source)),
    _open_parquet,
    takes=("image_column", "caption_columns", "label_column"),
)

# The library datasets

_SAVED = ("dataset_dict.json", "state.json")


def _is_dataset(source: str) -> bool:
    return source.startswith(_PREFIX) or any((user_path(source) / name).is_file() for name in _SAVED)


def _open_dataset(source: str, request: Request) -> PictureSet:
    require(f"{request.field} {source}", "shards", "datasets")
    import datasets

    try:
        if source.startswith(_PREFIX):
            name, _, folder = source.removeprefix(_PREFIX).partition(":")
            place = Path(name)
            loaded = datasets.load_dataset(name, data_dir=str(user_path(folder)) if folder else None)
        else:
            place = user_path(source)
            loaded = datasets.load_from_disk(str(place))
    except Exception as error:  # noqa: BLE001 - the hub, its network and builders raise errors of many libraries
        raise UserError(
            f"{request.field} {source}: datasets cannot open it ({first_line(error)}); check the name and the network "
            "(HF_HUB_OFFLINE keeps it off the hub), or fetch it elsewhere and name the folder of its save_to_disk"
        ) from None
    saved = place
    if isinstance(loaded, datasets.DatasetDict):
        split = request.split or ("train" if "train" in loaded or len(loaded) > 1 else str(next(iter(loaded), "train")))
        if split not in loaded:
            raise no_split(source, split, [str(name) for name in loaded])
        loaded, saved = loaded[split], place / str(split)
    if not isinstance(loaded, datasets.Dataset) or not len(loaded):
        raise UserError(f"{request.field} {source}: holds no rows; name a data set that does")
    features = loaded.features
    pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image) or _is_binary(kind)]
    columns = _columns(f"{request.field} {source}", list(features), pictures, request)
    if columns.image not in pictures:
        raise UserError(f"{request.field} {source}: the column {columns.image} holds no pictures; name another with "
                        "--image-column")  # fmt: skip
    rows = loaded.select_columns([columns.image])
    if isinstance(features[columns.image], datasets.Image):
        rows = rows.cast_column(columns.image, datasets.Image(decode=False))
    file = saved / "state.json"
    if not file.is_file():
        file = Path(loaded.cache_files[0]["filename"]) if loaded.cache_files else None
    kind = features[columns.label] if columns.label else None
    names = kind.names if isinstance(kind, datasets.ClassLabel) else None
    cells = {name: list(loaded[name]) for name in columns.texts}
    if names is not None and columns.label:
        cells[columns.label] = [None if label == NO_LABEL else label for label in cells[columns.label]]
    entries = [DatasetEntry(rows, row, columns.image, file) for row in range(len(rows))]
    return _picture_set(place, entries, columns, cells, names, request)


def _is_binary(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


DATASET = Reader(
    "what the library datasets opens (a folder of save_to_disk, or datasets:NAME)",
    _is_dataset,
    _open_dataset,
    takes=("image_column", "caption_columns", "label_column"),
)
