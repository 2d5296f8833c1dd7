"""Shards by path, folder and pattern: what a user names, expanded to files, and what beside them is not read."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from focalclip.base.errors import UserError, require
from focalclip.base.files import user_path
from focalclip.data.index import PassedOver, UsableShards, members_passed_over, read_captions, read_pairs
from focalclip.data.reader import PictureSet, Reader, Request, data_in

LEFT_OUT = "left-out.txt"
"""Beside shards that were made of another source: what of it is not in them, in one line for each reason; and behind an
empty line the name of every picture."""

OVERVIEW = "index.html"
"""The page beside shards that shows what is in them."""


class TrainShards(list[Path]):
    """The shards of one or more sources, in order.

    Args:
        sources: The shards of each source.
        entries: The number of the entry of ``data.train`` that names each source; None: each is an entry.
    """

    def __init__(self, sources: Iterable[Iterable[Path]], entries: Sequence[int] | None = None):
        numbered = [(path, number) for number, paths in enumerate(sources) for path in paths]
        super().__init__(path for path, _ in numbered)
        self.sources = tuple(number for _, number in numbered)
        """The number of the source that each shard belongs to, of which an entry with ``::`` names several."""
        self.entries = tuple(entries[number] if entries else number for number in self.sources)
        """The number of the entry of ``data.train`` that each shard belongs to."""


def source_numbers(shards: Sequence[Path]) -> list[tuple[int, int]]:
    """The numbers of source and entry that each shard belongs to; 0 for all of a plain list."""
    if isinstance(shards, TrainShards):
        return list(zip(shards.sources, shards.entries, strict=True))
    return [(0, 0)] * len(shards)


def names_shards(source: str) -> bool:
    """Whether a source is shards: a pattern, a path or URL of a tar, or a folder with tars directly in it."""
    if any(mark in source for mark in ("{", "::", "://")) or source.startswith("pipe:") or source.endswith(".tar"):
        return True
    return bool(_tars(user_path(source)))


def _open_shards(source: str, request: Request) -> PictureSet:
    shards = resolve_shards(source, request.field)
    folder = shards[0].resolve().parent
    return read_pairs(folder, shards, read_captions, request.limit)


SHARDS = Reader("shards, a folder of .tar files or a pattern like a/{000..331}.tar", names_shards, _open_shards)


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
    sources = [(number, source) for number, entry in enumerate(entries) for source in _expand(entry, field)]
    paths = TrainShards(
        ([path for name in names for path in _files(name, field)] for _, names in sources),
        [number for number, _ in sources],
    )
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


def left_out(train: Sequence[str], usable: UsableShards, key_rule: str) -> list[str]:
    """What of the training data is not read, in lines for the introduction of a run: bad shards, files, members.

    Args:
        train: The sources of ``data.train``.
        usable: The shards that are trained on.
        key_rule: ``data.key_rule``.
    """
    total = len(usable.shards) + len(usable.bad)
    notes = dict.fromkeys(shard.with_name(LEFT_OUT) for shard in usable.shards)
    found_notes = [note.read_text().splitlines() for note in notes if note.is_file()]
    written = [line for lines in found_notes for line in itertools.takewhile(bool, lines)]
    bad = [f"{len(usable.bad)} of {total} shards: {'; '.join(usable.bad)}"] if usable.bad else []
    lines = written + bad
    found = {"file": _files_passed_over(train), "member": members_passed_over(usable.shards, key_rule)}
    for what, reasons in found.items():
        for reason, (count, first) in reasons.items():
            lines.append(f"{count:,} {what}{'s' * (count > 1)}: {reason}, the first being {first}")
    return lines


def _files_passed_over(train: Sequence[str]) -> dict[str, PassedOver]:
    """What lies beside the tars in folders of shards, by the reason; hidden files and our indexes are none."""
    found: dict[str, PassedOver] = {}
    entries = [entry.strip() for entry in train if entry.strip() != "emoji" and names_shards(entry.strip())]
    folders = [user_path(name) for entry in entries for names in _expand(entry, "data.train") for name in names]
    for folder in filter(Path.is_dir, folders):
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or path.name.endswith((".index.npz", ".tar", LEFT_OUT, OVERVIEW)):
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
