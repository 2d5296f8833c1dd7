"""The one exception that is the user's to mend: one sentence that names the field or file, and the remedy."""


class UserError(ValueError):
    """A mistake in what the user wrote or pointed at; the command line prints its message without a stack trace."""


class SharedError(UserError):
    """One that all ranks raise together: one of them tells it, and nobody waits for a rank that has left."""


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough for our one sentence; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
