"""Errors that the user can correct: one sentence that names the field or file, and the remedy."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A mistake in what the user wrote or pointed at; the command line prints its message without a stack trace."""


class SharedError(UserError):
    """A UserError that all ranks raise together, so that none waits for a rank that has left; one of them prints it."""


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
