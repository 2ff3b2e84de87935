"""The process that carries out one job: ``python -m storylab.execution.worker``.

Reads the job as JSON on standard input and writes messages, one JSON line each, on standard output.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from storylab.errors import Diverged, Interrupted, UserError, out_of_memory
from storylab.execution.job import ActionName, Event, Job, OnEvent, Outcome, encode

Action = Callable[..., dict[str, Any] | None]
"""Takes a config, a function for events, and the job's options by name; returns the answer, if any."""

# Named, not imported: planning comes after execution in the order of rooms.
ACTIONS: Mapping[ActionName, str] = {
    "train": "storylab.execution.training:train_or_resume",
    "measure": "storylab.planning.measurements:calibrate",
    "bench": "storylab.planning.measurements:time_steps",
}


def find_action(name: ActionName) -> Action:
    """The function of an action; imports its module, and with it torch."""
    module, _, function = ACTIONS[name].partition(":")
    action: Action = getattr(import_module(module), function)
    return action


def perform(job: Job, on_event: OnEvent) -> Outcome:
    """Carry a job out in this process. Any error is the outcome of this job alone."""
    try:
        answer = find_action(job.action)(job.config, on_event, **job.options)
    except Diverged as stop:
        return Outcome("diverged", str(stop))
    except Interrupted as stop:
        return Outcome("interrupted", str(stop))
    except UserError as error:
        return Outcome("failed", _first_line(error))
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {_first_line(error)}"
        return Outcome("out of memory" if out_of_memory(error) else "failed", reason)
    return Outcome("done", answer=answer)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def send(message: Event | Outcome) -> None:
    """Write a message for the parent process. If that is gone, stop as on a signal: the work is saved."""
    try:
        print(encode(message), flush=True)
    except OSError:
        signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    # A scheduler warns every process of a job by this signal. The parent of this one acts on it.
    if hasattr(signal, "SIGUSR2"):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    send(perform(Job.from_json(sys.stdin.read()), send))
