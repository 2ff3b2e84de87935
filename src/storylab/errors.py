"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Input that cannot be used: its message says what is wrong and how to mend it, in one line.

    The command line prints the message and exits with code 2; a notebook sees a ``ValueError``.
    """
