"""Atomic writes: a file or folder is complete or absent, however its writer ends."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NO_DIGEST = "0" * 64


def home_expanded(path: str) -> str:
    """Text of a path, or of a name that begins with one, a leading ``~`` replaced by the home directory.

    Unlike ``Path.expanduser``, which raises, ``~NAME`` stays as it is where there is no user of that name.
    """
    return os.path.expanduser(path)  # noqa: PTH111


def user_path(path: str | Path) -> Path:
    """A path as the user wrote it, with :func:`home_expanded`; for every path that is given."""
    return Path(home_expanded(str(path)))


def is_plain_name(name: str) -> bool:
    """Whether a file or folder of this name lies where it is put: no ``..``, nothing absolute, no folder in it."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def is_inside(path: str) -> bool:
    """Whether a relative path stays below the folder that it is put to: nothing absolute, no ``..``."""
    return all(is_plain_name(part) for part in path.split("/"))


def cache_dir() -> Path:
    """``$FOCALCLIP_CACHE``, or ``focalclip`` in ``$XDG_CACHE_HOME``, or ``~/.cache/focalclip``."""
    if own := os.environ.get("FOCALCLIP_CACHE"):
        return user_path(own)
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "focalclip"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to: renamed to ``path`` when the block ends, removed where it fails.

    Parent folders are created. The name is unique, so that processes, also of several machines, may write one file.
    Whoever may read it is for the umask to say, whatever mode its writer gave it (safetensors: the owner alone).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        # the first error is the one to report: where nothing can be written, removing fails as well
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` to fill: takes the place of ``path`` when the block ends, removed where it fails.

    An existing ``path`` stays until then, and is restored where an earlier process was killed between two renames.
    One process at a time may do this for one ``path``. Modes are those of the umask, as in :func:`whole_file`.
    """
    new, old = path.with_name(f".{path.name}.new.tmp"), path.with_name(f".{path.name}.old.tmp")
    if old.exists() and not path.exists():
        old.rename(path)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        mode = stat.S_IMODE(new.stat().st_mode)
        for inside in new.rglob("*"):
            if not inside.is_symlink():
                inside.chmod(mode if inside.is_dir() else mode & 0o666)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def why_not_writable(path: Path) -> str | None:
    """Why no file can be written at ``path``, whose parent folders are created; None if one can. It is tried."""
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return "it is a folder" if path.is_dir() else None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file while the block runs: one process at a time; the lock ends with its process, however that ends.

    Parent folders are created.
    """
    import fcntl  # not on every system

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8, whole or not at all; returns :func:`user_path` of ``path``."""
    path = user_path(path)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
    return path


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON that every reader takes (no NaN), whole or not at all; returns :func:`user_path` of ``path``.

    Raises:
        ValueError: for NaN and infinities.
    """
    return write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed_json(path: Path, content: dict[str, Any]) -> Path:
    """Write JSON whose last field is the SHA-256 of the file with zeros in its place; returns ``path``."""
    text = json.dumps(content | {"sha256": _NO_DIGEST}, indent=2, allow_nan=False) + "\n"
    before, _, after = text.rpartition(_NO_DIGEST)
    return write_text(path, before + hashlib.sha256(text.encode()).hexdigest() + after)


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Read what :func:`write_sealed_json` wrote, without its last field.

    Raises:
        OSError: if there is no such file.
        ValueError: if a bit of it has changed, or it has no such field.
    """
    data = path.read_bytes()
    head, field, rest = data.rpartition(b'"sha256": "')
    digest, tail = rest[: len(_NO_DIGEST)], rest[len(_NO_DIGEST) :]
    expected = hashlib.sha256(head + field + _NO_DIGEST.encode() + tail).hexdigest()
    if not field or digest != expected.encode():
        raise ValueError("not the content that its hash was made of")
    content = json.loads(data)
    del content["sha256"]
    return content


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left under ``folder``: files and folders under temporary names.

    A folder that was moved aside for a new one which never came is put back, see :func:`whole_folder`. No other process
    may be writing there.
    """
    for old in folder.glob(".*.old.tmp"):
        final = old.with_name(old.name[1 : -len(".old.tmp")])
        if old.is_dir() and not final.exists():
            old.rename(final)
    for leftover in list(folder.rglob(".*.tmp")):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
