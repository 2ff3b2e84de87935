"""Run each job in a separate process on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import IO

from storylab.errors import UserError
from storylab.execution.executors import ExecutorRequest
from storylab.execution.job import Event, Job, OnEvent, Outcome, decode

# Ctrl-C in a terminal goes to every process of its group. Only this process shall hear it, and ask
# its jobs to stop. So jobs get a separate session, or a group on Windows, which has no sessions.
_NEW_GROUP: int = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
# Windows has no such signal.
_SIGKILL: int | None = getattr(signal, "SIGKILL", None)
# How often a job that waits for memory looks for a stop.
_WAIT_SECONDS = 1.0


class LocalExecutor:
    """Runs each job in a new process: its memory is measured alone, and a crash ends nothing else.

    Args:
        slots: how many processes may run at the same time.
        threads: threads of each job, on a CPU; by default torch's number, which is that of the cores.
        shared: whether other jobs, of this executor or not, may use the machine at the same time; recorded
            with each run, whose speed then is no measure.
        memory_bytes: memory of this machine for jobs that run at the same time. A job begins when its
            expected memory fits next to that of the others. A job on another device than the CPU, or
            whose memory is not known, runs alone.
    """

    def __init__(
        self,
        slots: int = 1,
        threads: int | None = None,
        shared: bool = False,
        memory_bytes: float = 0.0,
    ) -> None:
        self.slots = slots
        self._environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        if shared:
            from storylab.record.provenance import SHARED_MACHINE

            self._environment[SHARED_MACHINE] = "1"
        self._memory, self._taken = memory_bytes, 0.0
        self._memory_changed = threading.Condition()
        self._children: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, job: Job, on_event: OnEvent) -> Outcome:
        """See :class:`storylab.execution.job.Executor`."""
        with closing(self.messages(job)) as messages:
            for message in messages:
                if isinstance(message, Outcome):
                    return message
                on_event(message)
        raise AssertionError("a job without an outcome")

    def messages(self, job: Job) -> Generator[Event | Outcome, None, None]:
        """Carry a job out; yields its events as they come, and its outcome."""
        with self._room(job), tempfile.TemporaryFile() as errors:
            outcome: Outcome | None = None
            child = _start(self._environment, errors)
            self._children.add(child)
            try:
                with child:
                    if self._stopped:  # before the child was in the set
                        _ask_to_stop(child)
                    try:
                        for message in _converse(child, job):
                            if isinstance(message, Outcome):
                                outcome = message
                            else:
                                yield message
                    except BaseException:  # a second Ctrl-C, say: leave no process behind
                        _ask_to_stop(child)
                        raise
            finally:
                self._children.discard(child)
            yield outcome or self._sudden_end(child, errors)

    def stop(self) -> None:
        """See :class:`storylab.execution.job.Executor`."""
        self._stopped = True
        for child in tuple(self._children):
            _ask_to_stop(child)

    @contextmanager
    def _room(self, job: Job) -> Iterator[None]:
        """Wait until the memory that a job needs is free, and hold it."""
        expected = job.host_memory_bytes
        need = self._memory if expected is None else min(expected, self._memory)
        with self._memory_changed:
            while self._taken + need > self._memory and not self._stopped:
                self._memory_changed.wait(_WAIT_SECONDS)
            self._taken += need
        try:
            yield
        finally:
            with self._memory_changed:
                self._taken -= need
                self._memory_changed.notify_all()

    def _sudden_end(self, child: subprocess.Popen[str], errors: IO[bytes]) -> Outcome:
        """Describe the end of a process that reported no outcome."""
        if self._stopped:
            return Outcome("interrupted", "stopped before it could save anything")
        if _SIGKILL is not None and child.returncode == -_SIGKILL:
            return Outcome("killed", "killed (SIGKILL), as the system does when memory is short")
        errors.seek(0)
        last = errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
        return Outcome("failed", f"the process ended with {child.returncode}: {' '.join(last)}")


def executor(request: ExecutorRequest) -> LocalExecutor:
    """Runs jobs on this machine; several at a time share its cores and memory.

    Every run has the same number of threads, whatever else is under way: another number may give
    other bits.

    Raises:
        UserError: there are options, or more jobs than cores.
    """
    request.require_known("local")
    jobs = request.jobs or 1
    if jobs == 1:
        return LocalExecutor()
    import psutil

    from storylab.training.cores import available_cores

    cores = available_cores()
    if jobs > cores:
        raise UserError(f"--jobs {jobs} is more than the {cores} cores of this machine")
    memory = float(psutil.virtual_memory().available)
    return LocalExecutor(jobs, cores // jobs, shared=True, memory_bytes=memory)


def _start(environment: Mapping[str, str], errors: IO[bytes]) -> subprocess.Popen[str]:
    """A worker process with more environment variables, which waits for its job."""
    return subprocess.Popen(
        [sys.executable, "-m", "storylab.execution.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        creationflags=_NEW_GROUP,
        env={**os.environ, **environment},
    )


def _ask_to_stop(child: subprocess.Popen[str]) -> None:
    """Send the signal at which a worker saves its run and ends."""
    if sys.platform == "win32":  # where terminate() leaves no time to save
        child.send_signal(signal.CTRL_BREAK_EVENT)
    else:
        child.terminate()


def _converse(child: subprocess.Popen[str], job: Job) -> Iterator[Event | Outcome]:
    """Send a job to a process, and yield its messages until it ends."""
    assert child.stdin is not None and child.stdout is not None
    with contextlib.suppress(OSError):  # it ended before it could read
        child.stdin.write(job.to_json())
        child.stdin.close()
    for line in child.stdout:
        message = decode(line)
        if message is not None:
            yield message
    child.wait()
