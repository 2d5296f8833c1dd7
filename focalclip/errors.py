"""The one exception that is the user's to mend: one sentence that names the field or file, and the remedy."""


class UserError(ValueError):
    """A mistake in what the user wrote or pointed at; the command line prints its message without a stack trace."""
