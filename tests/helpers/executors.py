"""Executors for tests, which need no process: what storylab.execution.local does, at a function's speed."""

from __future__ import annotations

from collections.abc import Callable

from storylab.config import TrainConfig
from storylab.execution.job import Job, OnEvent, Outcome
from storylab.execution.worker import perform

Answer = Callable[[Job], Outcome]


def perform_quietly(job: Job) -> Outcome:
    """Carry a job out here and drop its events."""
    return perform(job, lambda event: None)


def train_here(config: TrainConfig) -> Outcome:
    """Train a run, or continue it, in this process."""
    return perform_quietly(Job("train", config))


class InProcess:
    """Carries jobs out in the calling thread, or lets ``answer`` make up their outcomes; keeps the jobs."""

    slots = 1

    def __init__(self, answer: Answer | None = None) -> None:
        self.answer = answer
        self.jobs: list[Job] = []
        self.stopped = False

    @property
    def actions(self) -> list[str]:
        """The actions of the jobs so far."""
        return [job.action for job in self.jobs]

    def run(self, job: Job, on_event: OnEvent) -> Outcome:
        self.jobs.append(job)
        return self.answer(job) if self.answer else perform(job, on_event)

    def stop(self) -> None:
        self.stopped = True


class Unused(InProcess):
    """For what must need no job."""

    def run(self, job: Job, on_event: OnEvent) -> Outcome:
        raise AssertionError(f"{job.action} was not to be done again")
