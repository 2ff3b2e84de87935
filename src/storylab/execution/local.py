"""Run each job in a separate process on this machine."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from typing import IO

from storylab.execution.job import Job, OnEvent, Outcome, decode

# Ctrl-C in a terminal goes to every process of its group. Only this process shall hear it, and ask
# its jobs to stop. So jobs get a separate session, or a group on Windows, which has no sessions.
_NEW_GROUP: int = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
# Windows has no such signal.
_SIGKILL: int | None = getattr(signal, "SIGKILL", None)


class LocalExecutor:
    """Runs each job in a new process: its memory is measured alone, and a crash ends nothing else.

    Args:
        slots: how many processes may run at the same time. They share the cores of this machine.
    """

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        self._children: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, job: Job, on_event: OnEvent) -> Outcome:
        """See :class:`storylab.execution.job.Executor`."""
        with tempfile.TemporaryFile() as errors:
            child = subprocess.Popen(
                [sys.executable, "-m", "storylab.execution.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                creationflags=_NEW_GROUP,
            )
            self._children.add(child)
            try:
                with child:
                    if self._stopped:  # before the child was in the set
                        _ask_to_stop(child)
                    try:
                        outcome = _converse(child, job, on_event)
                    except BaseException:  # a second Ctrl-C, say: leave no process behind
                        _ask_to_stop(child)
                        raise
            finally:
                self._children.discard(child)
            return outcome or self._sudden_end(child, errors)

    def stop(self) -> None:
        """See :class:`storylab.execution.job.Executor`."""
        self._stopped = True
        for child in tuple(self._children):
            _ask_to_stop(child)

    def _sudden_end(self, child: subprocess.Popen[str], errors: IO[bytes]) -> Outcome:
        """Describe the end of a process that reported no outcome."""
        if self._stopped:
            return Outcome("interrupted", "stopped before it could save anything")
        if _SIGKILL is not None and child.returncode == -_SIGKILL:
            return Outcome("killed", "killed (SIGKILL), as the system does when memory is short")
        errors.seek(0)
        last = errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
        return Outcome("failed", f"the process ended with {child.returncode}: {' '.join(last)}")


def _ask_to_stop(child: subprocess.Popen[str]) -> None:
    """Send the signal at which a worker saves its run and ends."""
    if sys.platform == "win32":  # where terminate() leaves no time to save
        child.send_signal(signal.CTRL_BREAK_EVENT)
    else:
        child.terminate()


def _converse(child: subprocess.Popen[str], job: Job, on_event: OnEvent) -> Outcome | None:
    """Send a job to a process and read its messages until it ends; None if it names no outcome."""
    assert child.stdin is not None and child.stdout is not None
    with contextlib.suppress(OSError):  # it ended before it could read
        child.stdin.write(job.to_json())
        child.stdin.close()
    outcome: Outcome | None = None
    for line in child.stdout:
        message = decode(line)
        if isinstance(message, Outcome):
            outcome = message
        elif message is not None:
            on_event(message)
    child.wait()
    return outcome
