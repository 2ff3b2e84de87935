"""The process of one tracker: ``python -m storylab.tracking.worker MODULE:CLASS``.

Reads the run and then messages on standard input, a JSON line each, and writes one
:class:`~storylab.tracking.protocol.Answer` on standard output. It imports the tracker's library and
no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from storylab.record.schema import Row
from storylab.tracking.points import Clock, run_end
from storylab.tracking.protocol import Answer, End, Rows, TrackedRun, Tracker
from storylab.tracking.secrets import without_secrets

T = TypeVar("T")
# Points that are sent in one call; MLflow takes a thousand numbers.
BATCH = 50
# Seconds to send the rest after the run's process has gone; nobody else could end a tracker that hangs.
ORPHAN_SECONDS = 120.0
NICENESS = 5


def serve(target: str, messages: BinaryIO) -> Answer:
    """Pass a run on to a tracker until its end; returns the last words."""
    place = ""
    try:
        run = msgspec.json.decode(messages.readline(), type=TrackedRun)
        tracker = _load(target, run)
        place = tracker.place
        _pass_on(run, tracker, messages)
        return Answer(place=without_secrets(tracker.place))
    except (Exception, SystemExit) as error:
        # The first line: libraries add advice to their errors.
        lines = without_secrets(str(error)).strip().splitlines()
        reason = " ".join(lines[0].split()) if lines else type(error).__name__
        return Answer(place=without_secrets(place), failed=reason)


def _load(target: str, run: TrackedRun) -> Tracker:
    module, _, name = target.partition(":")
    tracker: Tracker = getattr(import_module(module), name)(run)
    return tracker


def _pass_on(run: TrackedRun, tracker: Tracker, messages: BinaryIO) -> None:
    clock = Clock()
    for rows in _batches(_history(run)):
        tracker.log(list(clock.points(rows)))
    decoder = msgspec.json.Decoder(Rows | End)
    for line in messages:
        message = decoder.decode(line)
        if isinstance(message, End):
            tracker.finish(None if message.summary is None else run_end(message.summary))
            return
        for rows in _batches(message.rows):
            tracker.log(list(clock.points(rows)))
    # The run's process has gone without a word.
    watchdog = threading.Timer(ORPHAN_SECONDS, os._exit, (1,))
    watchdog.daemon = True
    watchdog.start()
    tracker.finish(None)
    watchdog.cancel()


def _history(run: TrackedRun) -> list[Row]:
    """The rows from before this process."""
    if not run.history_bytes:
        return []
    with Path(run.history).open("rb") as file:
        data = file.read(run.history_bytes)
    whole = data[: data.rfind(b"\n") + 1]  # a kill may have cut the last line
    return msgspec.json.Decoder(Row).decode_lines(whole)


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def main() -> None:
    """Serve the run on standard input."""
    # A library's prints must not mix with the answer, and the signals are for the run.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    answer = serve(sys.argv[1], sys.stdin.buffer)
    with contextlib.suppress(OSError):  # nobody may be left to read it
        answers.write(msgspec.json.encode(answer))
        answers.flush()
    # At once: a library's threads and exit handlers may hang, and everything is sent.
    os._exit(0)


if __name__ == "__main__":
    main()
