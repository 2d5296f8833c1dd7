"""What a user names as data, and the one table of what can be read.

Training (``data.train``), ``make_shards``, retrieval (``--data``) and the evaluation of task folders all look a source
up in :data:`READERS`, so a new kind of source is one new module with a :class:`~focalclip.data.reader.Reader` and one
line in the table (docs/extending.md).
"""

import hashlib
import json
import pkgutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from focalclip.base.errors import UserError, require
from focalclip.base.files import cache_dir, locked, user_path, whole_folder, write_text
from focalclip.data.images import IMAGE_SUFFIXES
from focalclip.data.index import PassedOver, UsableShards, members_passed_over, read_captions, read_pairs
from focalclip.data.reader import PictureSet, Reader, Request, data_in

READERS = [
    "focalclip.data.sources:SHARDS",
    "focalclip.data.folders:TASK_FOLDER",
    "focalclip.data.folders:CLASS_FOLDERS",
    "focalclip.data.tables:TABLE",
    "focalclip.data.tables:CAPTION_FILE",
]
"""``module:name`` of every reader, imported when it is asked for; the first that recognises a source reads it."""

_LEFT_OUT = "left-out.txt"  # beside shards written into the cache: what of the source is not in them

_OTHER_TABLES = (".parquet", ".arrow", ".xlsx")  # kinds of tables that are not read

_CACHED_FORMAT = 2  # raise it when the shards written for one and the same source could change


def find_reader(source: str) -> Reader | None:
    """The reader of a source; None if no reader recognises it."""
    return next((reader for reader in map(pkgutil.resolve_name, READERS) if reader.recognises(source)), None)


def open_source(source: str, request: Request) -> PictureSet:
    """Read captions and labels of a source of any known kind; its pictures are left where they are.

    Raises:
        Unavailable: if it has no such split.
        UserError: if nothing is there, it is of no known kind, or it is faulty; names the file.
    """
    return _reader_of(source, request.field).open(source, request)


class TrainShards(list[Path]):
    """The shards of one or more sources, in order."""

    def __init__(self, sources: Iterable[Iterable[Path]]):
        numbered = [(path, number) for number, paths in enumerate(sources) for path in paths]
        super().__init__(path for path, _ in numbered)
        self.sources = tuple(number for _, number in numbered)
        """The number of the source that each shard belongs to."""


def source_numbers(shards: Sequence[Path]) -> list[int]:
    """The number of the source that each shard belongs to; 0 for all of a plain list."""
    return list(shards.sources) if isinstance(shards, TrainShards) else [0] * len(shards)


def training_shards(train: str | list[str], field: str = "data.train", max_missing: int = 0) -> TrainShards:
    """The shards to train on: the default corpus, the shards named, or any other source written as shards once.

    Shards of other sources lie in ``sources/`` of the cache folder and are written again when a caption, a label, or
    the size or time of change of a picture's file is no longer the same. Several processes may ask at once; one writes.

    Args:
        train: ``emoji``, or what :func:`resolve_shards` or :func:`open_source` takes.
        field: Name of the setting, for messages.
        max_missing: So many of the shards named may be missing.

    Raises:
        UserError: if the source cannot be read, or the cache folder cannot be written.
    """
    if train == "emoji":
        from focalclip.data.corpus.emoji import ensure_corpus

        return resolve_shards(str(ensure_corpus().train))
    if isinstance(train, list):
        _refuse_other_sources(train, field)
    if not isinstance(train, str) or not train.strip() or _names_shards(train):
        return resolve_shards(train, field, max_missing)
    reader = _reader_of(train, field)
    try:
        pictures = reader.open(train, Request(field=field))
    except UserError as error:
        option = next((option for option in ("--image-root", "--split") if option in str(error)), None)
        hint = f"; {option} is an option of: {_make_shards(train)}" if option else ""
        raise UserError(f"{error}{hint}") from None
    cache = cache_dir() / "sources"
    folder = cache / _digest(pictures)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")):
            if not folder.is_dir():
                from focalclip.data.write import captions_of, write_pictures

                print("; ".join([f"Writing {train} as shards in {folder} (once)", *pictures.remarks]), file=sys.stderr)
                with whole_folder(folder) as temporary:
                    write_pictures(pictures, temporary)
                    pairs = zip(pictures.entries, captions_of(pictures), strict=True)
                    if without := [entry.name for entry, captions in pairs if not captions]:
                        note = f"{len(without):,} pictures: neither caption nor label, the first being {without[0]}\n"
                        write_text(temporary / _LEFT_OUT, note)
    except OSError as error:
        raise UserError(f"{field}: {folder} cannot be written ({error.strerror}); set FOCALCLIP_CACHE") from None
    return resolve_shards(str(folder), field)


def _reader_of(source: str, field: str) -> Reader:
    reader = find_reader(source)
    if reader is not None:
        return reader
    path = user_path(source)
    if not path.exists():
        raise UserError(f"{field} {source}: no such file or folder")
    if (kind := _unreadable_kind(path)) is not None:
        table = f"{path.resolve().stem}.csv"
        root = f" --image-root {source}" if path.is_dir() else ""
        raise UserError(
            f"{field} {source}: {kind}, which cannot be read directly; list the pictures in a table {table} with the "
            f"columns path and caption, then run: {_make_shards(table)}{root}"
        )
    known = "; ".join(reader.what for reader in map(pkgutil.resolve_name, READERS))
    raise UserError(f"{field} {source}: not a source that can be read; expected one of: {known}")


def _make_shards(source: str) -> str:
    """The command that writes a source as shards."""
    return f"python scripts/make_shards.py {source} {_shards_of(source)}"


def _shards_of(source: str) -> str:
    return f"shards/{user_path(source).resolve().stem}"


def _unreadable_kind(path: Path) -> str | None:
    """What people have instead of a source, in a few words; None if it is something else."""
    if path.is_file():
        return f"a {path.suffix[1:]} file" if path.suffix.lower() in _OTHER_TABLES else None
    names = [child.name.lower() for child in path.iterdir()]
    if "state.json" in names or "dataset_dict.json" in names:
        return "a data set saved by the library datasets"
    if any(name.endswith(_OTHER_TABLES) for name in names):
        return f"a folder of {', '.join(kind for kind in _OTHER_TABLES if any(n.endswith(kind) for n in names))} files"
    pictures = sum(name.endswith(IMAGE_SUFFIXES) for name in names)
    return f"a folder of {pictures:,} pictures without a folder for each class" if pictures else None


def _refuse_other_sources(entries: list[str], field: str) -> None:
    """Check that a list names shards alone.

    Raises:
        UserError: naming the entry and how to write it as shards.
    """
    for entry in map(str.strip, entries):
        if entry == "emoji":
            raise UserError(f"{field}: emoji, the default corpus, stands alone, not in a list")
        if entry and not _names_shards(entry) and (reader := find_reader(entry)) is not None:
            raise UserError(
                f"{field}: {entry} is {reader.what}, and a list holds shards alone; run: {_make_shards(entry)}   and "
                f"name {_shards_of(entry)} in its place"
            )


def _digest(pictures: PictureSet) -> str:
    """SHA-256, shortened, of all that decides the shards: what was read, and size and time of change of the files."""
    labels = pictures.labels
    content = {
        "format": _CACHED_FORMAT,
        "place": str(pictures.place.resolve()),
        "keys": [entry.key for entry in pictures.entries],
        "texts": [pictures.captions, pictures.keywords, pictures.class_names, pictures.templates],
        "labels": None if labels is None else hashlib.sha256(labels.tobytes()).hexdigest(),
        "files": [_stamp(file) for file in dict.fromkeys(entry.file for entry in pictures.entries)],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _stamp(file: Path | None) -> list[str | int]:
    if file is None:
        return []
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]


def _names_shards(source: str) -> bool:
    """A pattern, a path or URL of a tar, or a folder with tars directly in it."""
    if any(mark in source for mark in ("{", "::", "://")) or source.startswith("pipe:") or source.endswith(".tar"):
        return True
    return bool(_tars(user_path(source)))


def _open_shards(source: str, request: Request) -> PictureSet:
    shards = resolve_shards(source, request.field)
    folder = shards[0].resolve().parent
    return read_pairs(folder, shards, read_captions, request.limit)


SHARDS = Reader("shards, a folder of .tar files or a pattern like a/{000..331}.tar", _names_shards, _open_shards)


def resolve_shards(spec: str | list[str], field: str = "data.train", max_missing: int = 0) -> TrainShards:
    """Expand paths, folders and brace patterns into shard files.

    A pattern is expanded as webdataset does it: ``a/{000..331}.tar``, and several joined by ``::``. A folder stands for
    the ``.tar`` files directly in it, sorted by name. Each entry of a list, and each part between ``::``, is a source.

    Args:
        spec: One path, folder or pattern, or a list of them.
        field: Name of the setting, for messages.
        max_missing: So many of the files named may be missing; they are returned all the same.

    Raises:
        UserError: if nothing is named, a pattern cannot be expanded, a shard is missing, remote or named twice, or a
            folder holds no shards.
    """
    entries = [entry.strip() for entry in ([spec] if isinstance(spec, str) else spec)]
    if not entries or not all(entries):
        raise UserError(f"{field} is empty; name shards, a folder of .tar files or a pattern like a/{{000..331}}.tar")
    sources = [source for entry in entries for source in _expand(entry, field)]
    paths = TrainShards([path for name in names for path in _files(name, field)] for names in sources)
    missing = [str(path) for path in paths if not path.is_file()]
    if len(missing) > max_missing:
        raise UserError(
            f"{field}: {len(missing)} of {len(paths)} shards do not exist ({_some(missing)}); "
            "correct the path or pattern, or fetch the missing files"
        )
    twice = [str(path) for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if twice:
        raise UserError(f"{field}: {len(twice)} shards are named more than once ({_some(twice)}); name each shard once")
    return paths


def _expand(entry: str, field: str) -> list[list[str]]:
    """The names of each source of one entry; remote ones are turned away before they look like missing files."""
    require(f"{field} {entry}", "eval", "webdataset")
    from webdataset.shardlists import expand_urls

    try:
        sources = [expand_urls(part) for part in entry.split("::")]
    except ValueError:
        raise UserError(f"{field}: the braces of {entry!r} do not match; write it like a/{{000..331}}.tar") from None
    names = [name for source in sources for name in source]
    if not all(names):
        raise UserError(f"{field}: the pattern {entry!r} holds an empty name; write it like a/{{000..331}}.tar")
    remote = [name for name in names if "://" in name or name.startswith("pipe:")]
    if remote:
        raise UserError(
            f"{field}: {remote[0]!r} is remote, and only files can be read so far; mount the store or copy the shards"
        )
    return sources


def left_out(train: str | list[str], usable: UsableShards, key_rule: str) -> list[str]:
    """What of the training data is not read, in lines for the introduction of a run: bad shards, files, members.

    Args:
        train: ``data.train``.
        usable: The shards that are trained on.
        key_rule: ``data.key_rule``.
    """
    total = len(usable.shards) + len(usable.bad)
    note = usable.shards[0].with_name(_LEFT_OUT)
    written = note.read_text().splitlines() if note.is_file() else []
    bad = [f"{len(usable.bad)} of {total} shards: {'; '.join(usable.bad)}"] if usable.bad else []
    lines = written + bad
    found = {"file": _files_passed_over(train), "member": members_passed_over(usable.shards, key_rule)}
    for what, reasons in found.items():
        for reason, (count, first) in reasons.items():
            lines.append(f"{count:,} {what}{'s' * (count > 1)}: {reason}, the first being {first}")
    return lines


def _files_passed_over(train: str | list[str]) -> dict[str, PassedOver]:
    """What lies beside the tars in folders of shards, by the reason; hidden files and our indexes are none."""
    if train == "emoji" or (isinstance(train, str) and not _names_shards(train)):
        return {}
    found: dict[str, PassedOver] = {}
    entries = [train] if isinstance(train, str) else train
    folders = [user_path(name) for entry in entries for names in _expand(entry.strip(), "data.train") for name in names]
    for folder in filter(Path.is_dir, folders):
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or path.name.endswith(".index.npz") or path.suffix == ".tar":
                continue
            suffixes = path.suffixes[-2:] if ".tar" in path.suffixes[-2:] else path.suffixes[-1:]
            reason = f"the extension {''.join(suffixes)}" if suffixes else "no extension"
            reason = "folders, into which is not looked" if path.is_dir() else reason
            count, first = found.get(reason, (0, str(path)))
            found[reason] = PassedOver(count + 1, first)
    return found


def _tars(folder: Path) -> list[Path]:
    """The shards directly in a folder; what else lies there is counted by :func:`left_out`."""
    return [path for path in data_in(folder) if path.name.endswith(".tar")]


def _files(name: str, field: str) -> list[Path]:
    """The files of one expanded name: itself, or the tars in the folder."""
    path = user_path(name)
    if not path.is_dir():
        return [path]
    tars = _tars(path)
    if not tars:
        others = sorted(item.name for item in path.iterdir() if not item.name.startswith("."))
        has = f" (it holds {_some(others)})" if others else ""
        raise UserError(f"{field}: the folder {name} holds no .tar file{has}; name a folder of WebDataset shards")
    return tars


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
