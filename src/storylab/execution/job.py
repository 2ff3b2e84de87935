"""Jobs that another process carries out, the events that it sends meanwhile, its outcome, and executors."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from storylab import config as configs
from storylab.config import TrainConfig
from storylab.errors import Interrupted
from storylab.training.signals import stop_signals

ActionName = Literal["train", "measure", "bench"]
Status = Literal["done", "diverged", "failed", "interrupted", "out of memory", "killed", "lost"]
"""How a job ended. ``killed``: its process was, perhaps because memory was short. ``lost``: its machine
failed or was taken away, which says nothing about the job."""


@dataclass(frozen=True)
class Job:
    """One action on one config.

    Attributes:
        action: a key of ``storylab.execution.worker.ACTIONS``.
        config: the run to train or to measure.
        options: further arguments of the action, JSON values.
        seconds: expected duration, for executors that reserve time; None if unknown.
        memory_bytes: expected peak memory of the device, or of the process on a CPU; None if unknown.
    """

    action: ActionName
    config: TrainConfig
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    memory_bytes: float | None = None

    @property
    def gpus(self) -> int:
        """Number of CUDA devices that it needs."""
        return int(self.config.device.startswith("cuda"))

    @property
    def host_memory_bytes(self) -> float | None:
        """Expected peak memory of the process; None if unknown, as where the model is on another device."""
        return self.memory_bytes if self.config.device == "cpu" else None

    def to_json(self) -> str:
        """The job as text for the process that carries it out, which needs no expectations."""
        config = configs.to_dict(self.config)
        return json.dumps({"action": self.action, "config": config, "options": dict(self.options)})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that :meth:`to_json` wrote."""
        values = json.loads(text)
        return cls(values["action"], configs.from_dict(values["config"]), values["options"])


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` parts of the work called ``name`` are done."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Outcome:
    """The end of a job.

    Attributes:
        status: how it ended.
        reason: why, in one line; empty if all went well.
        answer: the result of a measurement; None for training, which leaves its result in the run folder.
    """

    status: Status
    reason: str = ""
    answer: dict[str, Any] | None = None


# Rows and log lines are in the run folder already, so progress is all that a job reports.
Event = Progress
OnEvent = Callable[[Event], None]
_MESSAGES: dict[str, type[Event | Outcome]] = {"progress": Progress, "outcome": Outcome}


def encode(message: Event | Outcome) -> str:
    """An event or outcome as one line of JSON."""
    (kind,) = (name for name, known in _MESSAGES.items() if isinstance(message, known))
    return json.dumps({"message": kind, **dataclasses.asdict(message)})


def decode(line: str) -> Event | Outcome | None:
    """Decode the message in a line; None if a library printed the line."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        values = json.loads(line)
        return _MESSAGES[values.pop("message")](**values)
    return None


def paced(messages: Iterator[Event | Outcome], seconds: float = 1.0) -> Iterator[Event | Outcome]:
    """Leave out events that come within ``seconds`` of the one before, except where they end something."""
    due = 0.0
    for message in messages:
        last = isinstance(message, Outcome) or message.done == message.total
        if last or time.monotonic() >= due:
            yield message
            due = time.monotonic() + seconds


class Executor(Protocol):
    """Carries jobs out: here, on a cluster, or wherever else Python and the run folders are.

    Attributes:
        slots: how many jobs it runs at the same time.
    """

    slots: int

    def run(self, job: Job, on_event: OnEvent) -> Outcome:
        """Carry a job out, pass its events on, and return its outcome.

        Up to :attr:`slots` threads call it at the same time. A fault of the job is an outcome, not an
        exception. One of the threads handles the signals, between its waits: wait for the next event
        or for seconds, not in one piece until the job ends.
        """
        ...

    def stop(self) -> None:
        """Ask all jobs, present and later ones, to save their work and end as ``interrupted``.

        Returns at once, so that a signal handler can call it.
        """
        ...


def run_interruptibly(executor: Executor, job: Job) -> Outcome:
    """Run one job without showing its progress; a signal to this process stops it.

    Raises:
        Interrupted: SIGTERM or Ctrl-C stopped this process and the job.
    """
    signals: list[int] = []

    def stop(number: int) -> None:
        signals.append(number)
        executor.stop()

    with stop_signals(stop):
        outcome = executor.run(job, lambda event: None)
    if signals:
        raise Interrupted("interrupted", signals[0])
    return outcome
