"""Files that others see whole or not at all, however their writer ends; and folders that belong to one process."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from focalclip.base.errors import UserError

_BEAT = 5.0  # seconds between two times that a folder's owner touches its record
_SILENCE = 6 * _BEAT  # without one, an owner on another host has ended

# how libraries report that a write failed
_FAILED_WRITES = re.compile(
    r"PytorchStreamWriter|inline_container|unexpected pos|os error (\d+)|No space left", re.IGNORECASE
)

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
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
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
    try:
        with writing(path):
            new.mkdir(parents=True)
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
def writing(path: Path) -> Iterator[None]:
    """Within this context a failed write, also one that a library reports its own way, is an OSError with a file name.

    The name is ``path`` where the error has none.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:
        # torch raises RuntimeError, safetensors an error of its own; torch's has no number
        match = _FAILED_WRITES.search(str(error))
        if match is None or isinstance(error, UserError):
            raise
        raise OSError(number := int(match[1] or errno.ENOSPC), os.strerror(number), str(path)) from error


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own ``folder``, which is made if need be, while the block runs: no other process on any host does so too.

    The file ``.owner`` in it names host and process. It is locked, so that the system frees the folder when its owner
    ends, however that ends. File systems without locks between hosts need more: the owner touches the file every few
    seconds, and another host believes that it has ended once it no longer does.

    Raises:
        UserError: at once, naming host and process, if the folder has an owner.
    """
    was_there, path = folder.is_dir(), folder / ".owner"
    file = _take(path)
    _sign(file)
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(file, done), daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        beat.join()
        with contextlib.suppress(OSError):
            path.unlink()
            file.close()
        if not was_there:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _take(path: Path) -> BinaryIO:
    import fcntl  # not on every system

    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        os.register_at_fork(after_in_child=file.close)  # a loader process must not hold the lock of a killed run
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except BlockingIOError:
            file.close()
            raise _refusal(path) from None
        except OSError:  # Lustre, some network and user-space file systems have no locks
            is_locked = False
        if _has_owner(path, is_locked):
            file.close()
            raise _refusal(path)
        with contextlib.suppress(FileNotFoundError):  # its owner has removed it meanwhile
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    return file


def _has_owner(path: Path, is_locked: bool) -> bool:
    """Whether the process that left its name in the file still lives."""
    owner = _read_owner(path)
    if not owner:
        return False
    if owner["host"] == socket.gethostname():
        import psutil

        return not is_locked and psutil.pid_exists(owner["pid"])
    seen, end = _last_beat(path), time.monotonic() + _SILENCE
    print(
        f"{path.parent}: a run on {owner['host']} is recorded as owner; waiting up to {_SILENCE:.0f} s to see whether "
        "it still runs",
        file=sys.stderr,
    )
    while time.monotonic() < end:
        time.sleep(1)
        if (beat := _last_beat(path)) != seen:
            return beat is not None
    return False


def _read_owner(path: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads(path.read_bytes())
        return {"host": owner["host"], "pid": int(owner["pid"])}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _last_beat(path: Path) -> int | None:
    try:
        with path.open("rb") as file:  # NFS asks its server for times when a file is opened
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _beat(file: BinaryIO, done: threading.Event) -> None:
    while not done.wait(_BEAT):
        _sign(file)


def _sign(file: BinaryIO) -> None:
    name = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
    with contextlib.suppress(OSError):  # on a full disk the lock alone must do, until there is room
        os.ftruncate(file.fileno(), os.pwrite(file.fileno(), name, 0))


def _refusal(path: Path) -> UserError:
    owner = _read_owner(path)
    who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    return UserError(
        f"{path.parent}: {who} is using this run directory; wait for it or stop it "
        f"(kill {owner['pid'] if owner else 'PID'}), or choose another --name"
    )


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

    What was moved aside for a new one that never came is put back, see :func:`whole_folder`. No other process may be
    writing there.
    """
    for old in folder.rglob(".*.old.tmp"):
        final = old.with_name(old.name[1 : -len(".old.tmp")])
        if not final.exists():
            old.rename(final)
    for leftover in list(folder.rglob(".*.tmp")):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
