"""From what ``data.train`` says to a list of shard files."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from focalclip.base.errors import UserError


def resolve_shards(spec: str | list[str], field: str = "data.train") -> list[Path]:
    """Expand paths, folders and brace patterns into shard files.

    A pattern is expanded as webdataset does it: ``a/{000..331}.tar``, and several joined by ``::``. A folder stands for
    the ``.tar`` files directly in it, sorted by name.

    Args:
        spec: One path, folder or pattern, or a list of them.
        field: Name of the setting, for messages.

    Raises:
        UserError: if nothing is named, a pattern cannot be expanded, a shard is missing, remote or named twice, or a
            folder holds no shards.
    """
    entries = [entry.strip() for entry in ([spec] if isinstance(spec, str) else spec)]
    if not entries or not all(entries):
        raise UserError(f"{field} is empty; name shards, a folder of .tar files or a pattern like a/{{000..331}}.tar")
    paths = [path for entry in entries for name in _expand(entry, field) for path in _files(name, field)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{field}: {len(missing)} of {len(paths)} shards do not exist ({_some(missing)}); "
            "mend the path or pattern, or fetch the missing files"
        )
    twice = [str(path) for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if twice:
        raise UserError(f"{field}: {len(twice)} shards are named more than once ({_some(twice)}); name each shard once")
    return paths


def _expand(entry: str, field: str) -> list[str]:
    """The names that one entry stands for; remote ones are turned away before they look like missing files."""
    from webdataset.shardlists import expand_urls

    try:
        names = expand_urls(entry)
    except ValueError:
        raise UserError(f"{field}: the braces of {entry!r} do not match; write it like a/{{000..331}}.tar") from None
    if not all(names):
        raise UserError(f"{field}: the pattern {entry!r} holds an empty name; write it like a/{{000..331}}.tar")
    remote = [name for name in names if "://" in name or name.startswith("pipe:")]
    if remote:
        raise UserError(
            f"{field}: {remote[0]!r} is remote, and only files can be read so far; mount the store or copy the shards"
        )
    return names


def _files(name: str, field: str) -> list[Path]:
    """The files of one expanded name: itself, or the tars in the folder."""
    path = Path(name).expanduser()
    if not path.is_dir():
        return [path]
    tars = sorted(path.glob("*.tar"))
    if not tars:
        raise UserError(f"{field}: the folder {name} holds no .tar file; name a folder of WebDataset shards")
    return tars


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
