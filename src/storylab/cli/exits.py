"""Turn exceptions into a line on standard error and an exit code."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable

from storylab.errors import Diverged, Interrupted, StoppedAtOnce, UserError

# The system's reasons for an output that cannot be written any longer.
OUTPUT_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# The exit code of a program that SIGPIPE ends: 128 + 13.
READER_LEFT = 141


def guarded(work: Callable[[], int]) -> int:
    """Run ``work``; every fault that users can cause becomes one line on standard error and an exit
    code."""
    _open_output()
    try:
        code = work()
        sys.stdout.flush()  # here, so that a full disk is reported
        return code
    except (UserError, Interrupted, StoppedAtOnce, Diverged) as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        _discard_output()
        return READER_LEFT
    except OSError as error:
        if error.filename is None and error.errno in OUTPUT_FAULTS:
            _discard_output()
            return _fail(f"cannot write the output: {error.strerror}")
        from storylab.files import system_words

        named = error.filename is not None
        return _fail(f"cannot use {system_words(error)}" if named else system_words(error))


def _fail(message: str, exit_code: int = UserError.exit_code) -> int:
    # A name may hold a line break, and a message is one line.
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    print(f"storylab: {line}", file=sys.stderr)
    return exit_code


def _open_output() -> None:
    """Make every output printable: replace characters that the terminal lacks, and drop the text for an
    output that is closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Takes the lowest free descriptor, that of the closed output, before another file does.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as we run
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _discard_output() -> None:
    """Prevent Python's error at exit about buffered text that it cannot write."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
