"""Training data from any source: shards that are named are taken as they are, all else is written as shards once."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from focalclip.base.errors import UserError
from focalclip.base.files import cache_dir, locked
from focalclip.config import SourceConfig, source_of
from focalclip.data.reader import PictureSet, Request
from focalclip.data.shards import TrainShards, names_shards, resolve_shards
from focalclip.data.sources import make_shards_command, reader_of
from focalclip.data.write import STATE, Output, source_digest, write_pictures

_OPTIONS = ("--image-root", "--split", "--image-column", "--caption-column", "--label-column")

_UNFINISHED = ".unfinished"


def training_shards(
    train: str | Sequence[str | SourceConfig],
    field: str = "data.train",
    max_missing: int = 0,
    max_faults: int = 1000,
) -> TrainShards:
    """The shards to train on: the default corpus, the shards named, or any other source written as shards once.

    Shards of other sources lie in ``sources/`` of the cache folder and are written again when a caption, a label, or
    the size or time of change of a picture's file is no longer the same. Several processes may ask at once; one writes.

    Args:
        train: One or more sources, each ``emoji``, or what :func:`resolve_shards` or :func:`open_source` takes.
        field: Name of the setting, for messages.
        max_missing: So many of the shards named may be missing.
        max_faults: So many pictures of another source may be damaged; they are left out and named beside its shards.

    Raises:
        UserError: if a source cannot be read, or the cache folder cannot be written.
    """
    entries = [train] if isinstance(train, str) else [source_of(entry) for entry in train]
    return resolve_shards([_as_shards(entry.strip(), field, max_faults) for entry in entries], field, max_missing)


def _as_shards(train: str, field: str, max_faults: int) -> str:
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
        option = next((option for option in _OPTIONS if option in str(error)), None)
        hint = f"; {option} is an option of: {make_shards_command(train)}" if option else ""
        raise UserError(f"{error}{hint}") from None
    cache = cache_dir() / "sources"
    folder = cache / source_digest(pictures)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _write(train, pictures, folder, max_faults)
    except OSError as error:
        raise UserError(f"{field}: {folder} cannot be written ({error.strerror}); set FOCALCLIP_CACHE") from None
    return str(folder)


def _write(train: str, pictures: PictureSet, folder: Path, max_faults: int) -> None:
    """Write shards under another name, where a later process goes on if this one is killed, and rename them."""
    for line in _remove_older(pictures, folder):
        print(line, file=sys.stderr)
    print(f"Writing {train} as shards in {folder} (once)", file=sys.stderr)
    unfinished = folder.with_suffix(_UNFINISHED)
    written = write_pictures(pictures, unfinished, output=Output(max_faults=max_faults, limit="data.max_faults"))
    unfinished.rename(folder)
    for line in written.remarks:
        print(f"left out {line}", file=sys.stderr)


def _remove_older(pictures: PictureSet, folder: Path) -> list[str]:
    """Remove unfinished shards of an earlier state of the source; returns a line about each finished copy.

    Those are left, because another run may be reading them.
    """
    lines = []
    for record in sorted(folder.parent.glob(f"*/{STATE}/source.json")):
        old = record.parents[1]
        try:
            source = json.loads(record.read_bytes())["source"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if source != str(pictures.place.absolute()) or old.stem == folder.stem:
            continue
        if old.suffix == _UNFINISHED:
            with locked(old.with_suffix(".lock")):
                shutil.rmtree(old, ignore_errors=True)
        else:
            size = sum(shard.stat().st_size for shard in old.glob("*.tar")) / 1e9
            lines.append(f"{source} was written before, with other content or options, in {old} ({size:.2f} GB); "
                         "remove that folder when no run reads it")  # fmt: skip
    return lines
