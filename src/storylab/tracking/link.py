"""The connection of a run to the process of a tracker: a bounded queue, and a thread that empties it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque

import msgspec

from storylab.record.schema import Row, Summary
from storylab.tracking.protocol import Answer, End, Rows, TrackedRun

# Rows that wait for a slow tracker: some megabytes, and minutes to hours of a run.
CAPACITY = 10_000
# Rows in one message.
BATCH = 500


class TrackerLink:
    """Starts the process of a tracker and hands rows over without ever waiting for it.

    Args:
        target: module and class of the tracker; see :class:`storylab.tracking.TrackerEntry`.
        run: the run to track.
        capacity: rows that may wait; further ones are dropped and counted.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, target: str, run: TrackedRun, capacity: int = CAPACITY) -> None:
        self.dropped = self.handed_over = 0
        self.late = False
        """Whether the process did not end in time and was killed."""
        self.answer: Answer | None = None
        """The last words of the process, once it has ended."""
        self._capacity = capacity
        self._rows: deque[Row] = deque()
        self._end: End | None = None
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "storylab.tracking.worker", target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries print what they like, keys included
            start_new_session=True,  # Ctrl-C is for the run, which then ends this process
        )
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows that have not been handed over."""
        return len(self._rows)

    def put(self, row: Row) -> None:
        """Queue a row, or drop it where the queue is full. Takes microseconds."""
        with self._changed:
            if len(self._rows) >= self._capacity:
                self.dropped += 1
                return
            self._rows.append(row)
            self._changed.notify()

    def finish(self, summary: Summary | None, seconds: float) -> None:
        """Have the process send the rest and end. After ``seconds`` it is killed, with its children.

        Args:
            summary: of the run; None where it was stopped.
            seconds: to wait at most. :attr:`answer` is None after a kill.
        """
        with self._changed:
            self._end = End(summary)
            self._changed.notify()
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.late = True
            self.kill()

    def kill(self) -> None:
        """End the process and its children at once."""
        if self._process.poll() is None:
            if sys.platform == "win32":
                self._process.kill()
            else:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._thread.join(5)  # its pipes are closed now

    def _work(self, run: TrackedRun) -> None:
        """In the thread: write messages until the end, then read the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        encoder = msgspec.json.Encoder()
        with self._process.stdout as answers:
            try:
                with self._process.stdin as stream:
                    stream.write(encoder.encode(run) + b"\n")
                    stream.flush()
                    while True:
                        message = self._next_message()
                        stream.write(encoder.encode(message) + b"\n")
                        stream.flush()
                        if isinstance(message, End):
                            break
                        self.handed_over += len(message.rows)
            except OSError:
                pass  # the process has ended, and its answer may say why
            answer = _decoded(answers.read())
        code = self._process.wait()
        self.answer = answer or Answer(failed=f"its process ended with {code}")

    def _next_message(self) -> Rows | End:
        """Wait for rows, or for the end once no rows are left."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._end)
            if not self._rows:
                assert self._end is not None
                return self._end
            count = min(len(self._rows), BATCH)
            return Rows([self._rows.popleft() for _ in range(count)])


def _decoded(data: bytes) -> Answer | None:
    try:
        return msgspec.json.decode(data, type=Answer)
    except msgspec.DecodeError:
        return None
