"""What a user names as data, and the one table of what can be read.

Training (``data.train``), ``make_shards``, retrieval (``--data``) and the evaluation of task folders all look a source
up in :data:`READERS`, so a new kind of source is one new module with a :class:`~focalclip.data.reader.Reader` and one
line in the table (docs/extending.md).
"""

import pkgutil
from pathlib import Path

from focalclip.base.errors import UserError
from focalclip.base.files import user_path
from focalclip.data.images import IMAGE_SUFFIXES
from focalclip.data.reader import PictureSet, Reader, Request

READERS = [
    "focalclip.data.shards:SHARDS",
    "focalclip.data.folders:TASK_FOLDER",
    "focalclip.data.columns:DATASET",
    "focalclip.data.beside:CAPTIONS_BESIDE",
    "focalclip.data.columns:PARQUET",
    "focalclip.data.folders:CLASS_FOLDERS",
    "focalclip.data.tables:TABLE",
    "focalclip.data.tables:CAPTION_FILE",
]
"""``module:name`` of every reader, imported when it is asked for; the first that recognises a source reads it."""

_OTHER_TABLES = (".arrow", ".xlsx")  # kinds of tables that are not read


def find_reader(source: str) -> Reader | None:
    """The reader of a source; None if no reader recognises it."""
    return next((reader for reader in map(pkgutil.resolve_name, READERS) if reader.recognises(source)), None)


def open_source(source: str, request: Request) -> PictureSet:
    """Read captions and labels of a source of any known kind; its pictures are left where they are.

    Raises:
        Unavailable: if it has no such split.
        UserError: if nothing is there, it is of no known kind, or it is faulty; names the file.
    """
    reader = reader_of(source, request.field)
    for name in ("image_column", "caption_columns", "label_column"):
        if getattr(request, name) and name not in reader.takes:
            option = "--" + name.removesuffix("s").replace("_", "-")
            raise UserError(f"{option}: {source} is {reader.what}, which has no such columns to choose; leave it away")
    return reader.open(source, request)


def reader_of(source: str, field: str) -> Reader:
    """The reader of a source.

    Raises:
        UserError: if nothing is there, or it is of no known kind; says what can be done with what is there.
    """
    reader = find_reader(source)
    if reader is not None:
        return reader
    path = user_path(source)
    if not path.exists():
        raise UserError(f"{field} {source}: no such file or folder (a data set of the hub is named datasets:USER/NAME)")
    if (kind := _unreadable_kind(path)) is not None:
        table = f"{path.resolve().stem}.csv"
        root = f" --image-root {source}" if path.is_dir() else ""
        raise UserError(
            f"{field} {source}: {kind}, which cannot be read directly; list the pictures in a table {table} with the "
            f"columns path and caption, then run: {make_shards_command(table)}{root}"
        )
    known = "; ".join(reader.what for reader in map(pkgutil.resolve_name, READERS))
    raise UserError(f"{field} {source}: not a source that can be read; expected one of: {known}")


def make_shards_command(source: str) -> str:
    """The command that writes a source as shards."""
    return f"python scripts/make_shards.py {source} {shards_folder(source)}"


def shards_folder(source: str) -> str:
    """Where that command writes them."""
    return f"shards/{user_path(source).resolve().stem}"


def _unreadable_kind(path: Path) -> str | None:
    """What people have instead of a source, in a few words; None if it is something else."""
    if path.is_file():
        return f"a {path.suffix[1:]} file" if path.suffix.lower() in _OTHER_TABLES else None
    names = [child.name.lower() for child in path.iterdir()]
    if any(name.endswith(_OTHER_TABLES) for name in names):
        return f"a folder of {', '.join(kind for kind in _OTHER_TABLES if any(n.endswith(kind) for n in names))} files"
    pictures = sum(name.endswith(IMAGE_SUFFIXES) for name in names)
    return (
        f"a folder of {pictures:,} pictures without captions beside them or a folder for each class"
        if pictures
        else None
    )
