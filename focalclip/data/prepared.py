"""Training data from any source: shards that are named are taken as they are, all else is written as shards once."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from focalclip.base.errors import UserError
from focalclip.base.files import cache_dir, locked, whole_folder, write_text
from focalclip.config import SourceConfig, source_of
from focalclip.data.reader import PictureSet, Request
from focalclip.data.shards import LEFT_OUT, TrainShards, names_shards, resolve_shards
from focalclip.data.sources import make_shards_command, reader_of

_CACHED_FORMAT = 2  # raise it when the shards written for one and the same source could change


def training_shards(
    train: str | Sequence[str | SourceConfig], field: str = "data.train", max_missing: int = 0
) -> TrainShards:
    """The shards to train on: the default corpus, the shards named, or any other source written as shards once.

    Shards of other sources lie in ``sources/`` of the cache folder and are written again when a caption, a label, or
    the size or time of change of a picture's file is no longer the same. Several processes may ask at once; one writes.

    Args:
        train: One or more sources, each ``emoji``, or what :func:`resolve_shards` or :func:`open_source` takes.
        field: Name of the setting, for messages.
        max_missing: So many of the shards named may be missing.

    Raises:
        UserError: if a source cannot be read, or the cache folder cannot be written.
    """
    entries = [train] if isinstance(train, str) else [source_of(entry) for entry in train]
    return resolve_shards([_as_shards(entry.strip(), field) for entry in entries], field, max_missing)


def _as_shards(train: str, field: str) -> str:
    """A source as what names its shards, which are written if they are not there."""
    if train == "emoji":
        from focalclip.data.corpus.emoji import ensure_corpus

        return str(ensure_corpus().train)
    if not train or names_shards(train):
        return train
    reader = reader_of(train, field)
    try:
        pictures = reader.open(train, Request(field=field))
    except UserError as error:
        option = next((option for option in ("--image-root", "--split") if option in str(error)), None)
        hint = f"; {option} is an option of: {make_shards_command(train)}" if option else ""
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
                        write_text(temporary / LEFT_OUT, note)
    except OSError as error:
        raise UserError(f"{field}: {folder} cannot be written ({error.strerror}); set FOCALCLIP_CACHE") from None
    return str(folder)


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
