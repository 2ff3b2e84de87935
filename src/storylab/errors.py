"""Exceptions that end a command in one line, each with its exit code; recognizes running out of memory."""


class UserError(ValueError):
    """Input that cannot be used. The message names the fault and the remedy, in one line.

    The command line prints the message and exits with :attr:`exit_code`; a notebook sees a ``ValueError``.
    """

    exit_code = 2


class Interrupted(Exception):  # noqa: N818 - a request, not a fault
    """A signal stopped the work. The training so far is saved, and the run can be resumed.

    Args:
        message: one line for the user.
        signal_number: the signal, such as ``signal.SIGTERM``.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as in shells."""
        return 128 + self.signal_number


class StoppedAtOnce(KeyboardInterrupt):
    """A second signal, which nothing may keep: what follows the last checkpoint is lost.

    Args:
        signal_number: the signal, such as ``signal.SIGTERM``.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(
            "stopped at once by a second signal: the work since the last checkpoint will be repeated"
        )
        self.exit_code = 128 + signal_number


class Diverged(Exception):  # noqa: N818 - a result, not a fault
    """Loss or gradients became non-finite. The weights from before that are saved."""

    exit_code = 1


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that a device or the machine ran out of memory.

    torch has no class for running out of the CPU's memory, so the message decides.
    """
    words = (
        "can't allocate memory",
        "out of memory",
        "not enough memory",
        "Cannot allocate memory",
    )
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
