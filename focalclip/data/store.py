"""Bytes of shards, wherever they lie: files of this machine, and objects of a store behind a URL."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True, order=True)
class RemoteFile:
    """A file behind a URL, such as ``s3://bucket/00000.tar``."""

    url: str

    @property
    def name(self) -> str:
        """The last part of the URL's path."""
        return self.url.partition("?")[0].rpartition("/")[2]

    def __str__(self) -> str:
        return self.url


Shard = Path | RemoteFile


class Stamp(NamedTuple):
    """What tells whether a shard has changed."""

    size: int
    """In bytes."""
    version: str
    """Time of change of a file; tag or time of an object."""


def stamps(shards: Sequence[Shard]) -> list[Stamp | None]:
    """Size and version of each shard; None for one that is not there."""
    return [_stamp(shard) for shard in shards]


def _stamp(shard: Shard) -> Stamp | None:
    assert isinstance(shard, Path)
    try:
        stat = shard.stat()
    except FileNotFoundError:
        return None
    return Stamp(stat.st_size, str(stat.st_mtime_ns))


def read_ranges(shard: Shard, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Parts of a shard, by offset and length in bytes; a part that lies behind its end comes back short.

    Raises:
        OSError: if it cannot be read.
    """
    assert isinstance(shard, Path)
    with shard.open("rb") as file:
        parts = []
        for offset, length in ranges:
            file.seek(offset)
            parts.append(file.read(length))
    return parts


@contextmanager
def local(shard: Shard) -> Iterator[Path]:
    """A file of this machine with the content of a shard, which stays as long as the context."""
    assert isinstance(shard, Path)
    yield shard
