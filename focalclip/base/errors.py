"""Errors that the user can correct: one sentence that names the field or file, and the remedy."""

import errno
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {
    **dict.fromkeys(_NO_ROOM, "make room on that disk, or choose another folder"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose a path that you may read and write"),
    errno.ENOMEM: "the machine is out of memory; use fewer processes (data.workers) or a smaller batch",
    errno.EIO: "the disk or its connection fails; check it",
    errno.ESTALE: "the network disk has lost this file; check its connection",
    errno.EFBIG: "the limit of file sizes is too low (ulimit -f)",
}


class UserError(ValueError):
    """A mistake in what the user wrote or pointed at; the command line prints its message without a stack trace."""

    status = 2
    """Exit status of a command that ends with it."""

    rank: int | None = None
    """The rank that raises it alone."""


class MachineError(UserError):
    """No mistake of the user's: the machine lacks something (room on a disk, memory), or has ended a process."""

    status = 1


class SharedError(UserError):
    """A UserError that all ranks raise together, so that none waits for a rank that has left; one of them prints it."""

    def __init__(self, message: str, status: int = UserError.status) -> None:
        super().__init__(message)
        self.status = status


def first_line(error: BaseException) -> str:
    """First line of another library's error message, to be quoted in ours; the name of its type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def unforeseen(error: Exception) -> str:
    """An exception that nobody foresaw as one sentence: its type and message, and the line of code that raised it."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)} (raised at {Path(where.filename).name}:{where.lineno})"


def faults_named(work: Callable[[], T]) -> T:
    """Do ``work``; what it raises besides UserError and OSError becomes a UserError, as ranks agree on.

    Raises:
        UserError: see :func:`unforeseen`.
    """
    try:
        return work()
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(unforeseen(error)) from error


def is_lack(error: OSError) -> bool:
    """Whether a read failed because the process lacks file descriptors or memory, not because of what was read."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def is_known(error: OSError) -> bool:
    """Whether the error is of a kind that :func:`system_error` has a remedy for."""
    return error.errno in _REMEDIES


def system_error(error: OSError) -> MachineError:
    """An error of the operating system in one sentence: the path, what happened, and the remedy."""
    path = f"{error.filename}: " if error.filename else ""
    remedy = _REMEDIES.get(error.errno or 0, "check that this path can be read and written")
    return MachineError(f"{path}{error.strerror or first_line(error)}; {remedy}")
