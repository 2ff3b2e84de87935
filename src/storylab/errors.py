"""The one exception that a user is meant to read, and how running out of memory is known."""


class UserError(ValueError):
    """Input that cannot be used: its message says what is wrong and how to mend it, in one line.

    The command line prints the message and exits with code 2; a notebook sees a ``ValueError``.
    """


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is a device or the machine running out of memory, told by its words, as torch has
    no class for the CPU's."""
    words = (
        "can't allocate memory",
        "out of memory",
        "not enough memory",
        "Cannot allocate memory",
    )
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
