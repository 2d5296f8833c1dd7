"""Errors that the user can correct: one sentence that names the field or file, and the remedy."""


class UserError(ValueError):
    """A mistake in what the user wrote or pointed at; the command line prints its message without a stack trace."""


class SharedError(UserError):
    """A UserError that all ranks raise together, so that none waits for a rank that has left; one of them prints it."""


def first_line(error: BaseException) -> str:
    """First line of another library's error message, to be quoted in ours; the name of its type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
