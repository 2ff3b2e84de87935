"""Jobs in other processes: messages, outcomes, stopping, and other executors for an experiment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import psutil
import pytest

from executors import InProcess, perform_quietly
from reporters import Watcher
from storylab.config import TrainConfig
from storylab.data.dataset import Dataset
from storylab.errors import Interrupted
from storylab.execution.job import (
    ActionName,
    Event,
    Job,
    OnEvent,
    Outcome,
    Progress,
    Status,
    decode,
    encode,
    run_interruptibly,
)
from storylab.execution.local import LocalExecutor
from storylab.execution.worker import ACTIONS, find_action, perform
from storylab.experiments.attempts import REMEDIES
from storylab.experiments.plan import PlannedRun, plan_runs
from storylab.experiments.scheduler import run_experiment
from storylab.experiments.spec import load_experiment
from storylab.record.folder import RunFolder
from storylab.record.schema import IterationRow
from test_experiments import write

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def planned(dataset: Dataset, tmp_path: Path) -> list[PlannedRun]:
    return plan_runs(load_experiment(write(tmp_path / "a.toml")), dataset, tmp_path / "runs")


# Messages


def test_a_job_reads_as_it_was_written(tiny_config: MakeConfig) -> None:
    job = Job("bench", tiny_config(), {"vocab_size": 300, "seconds": 0.5})
    assert Job.from_json(job.to_json()) == job


@pytest.mark.parametrize(
    "message",
    [Progress("training", 1, 8), Outcome("failed", "a\nb", None), Outcome("done", "", {"a": 1.5})],
)
def test_a_message_is_one_line_that_reads_as_it_was_written(message: Event | Outcome) -> None:
    line = encode(message)
    assert "\n" not in line and decode(line + "\n") == message


@pytest.mark.parametrize(
    "line",
    ["", "warning: x", "3", "null", "[]", "{}", '{"message": "x"}', '{"message": "progress"}'],
)
def test_other_output_of_a_process_is_no_message(line: str) -> None:
    assert decode(line) is None


def test_every_action_can_be_found() -> None:
    assert set(ACTIONS) == set(get_args(ActionName))
    assert all(callable(find_action(name)) for name in ACTIONS)
    assert set(REMEDIES) <= set(get_args(Status))


@pytest.mark.slow
def test_the_worker_starts_without_torch() -> None:
    """So that a job that cannot be read fails in a moment, and planning is not loaded to train."""
    script = "import sys, storylab.execution.worker, storylab.execution.local as local; sys.exit("
    script += "'torch' in sys.modules or any('storylab.planning' in m for m in sys.modules))"
    subprocess.run([sys.executable, "-c", script], check=True)


# Outcomes


def test_whatever_goes_wrong_is_an_outcome(
    tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = perform_quietly(Job("train", tiny_config(data_dir=tmp_path / "none")))
    assert missing.status == "failed" and str(tmp_path / "none") in missing.reason
    assert capsys.readouterr().err == ""
    bug = perform_quietly(Job("bench", tiny_config(), {"wrong": 1}))
    assert bug.status == "failed" and bug.reason.startswith("TypeError: ")
    assert "Traceback" in capsys.readouterr().err
    wild = perform_quietly(Job("train", tiny_config(learning_rate=1e30, grad_clip=0.0)))
    assert wild.status == "diverged" and "learning_rate" in wild.reason


@pytest.mark.slow
def test_a_killed_process_is_distinguished_from_a_failed_one(tiny_config: MakeConfig) -> None:
    def kill(event: Event) -> None:
        # The worker leads its own session, so its parent is this process.
        os.kill(psutil.Process().children()[0].pid, signal.SIGKILL)

    outcome = LocalExecutor().run(Job("train", tiny_config()), kill)
    assert outcome.status == "killed" and "SIGKILL" in outcome.reason


@pytest.mark.slow
def test_a_process_that_cannot_start_its_work_names_its_last_line(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A job that the new process cannot read.
    monkeypatch.setattr(Job, "to_json", lambda job: "no JSON")
    outcome = LocalExecutor().run(Job("train", tiny_config()), print)
    assert outcome.status == "failed" and "the process ended with 1: json" in outcome.reason


# Stopping


@pytest.mark.slow
def test_an_executor_that_is_stopped_saves_its_jobs(tiny_config: MakeConfig) -> None:
    executor = LocalExecutor()
    config = tiny_config(max_iters=4000)

    def stop(event: Event) -> None:
        if event.name == "training":
            executor.stop()

    outcome = executor.run(Job("train", config), stop)
    assert outcome.status == "interrupted" and "storylab resume" in outcome.reason
    assert config.out_dir is not None and RunFolder(config.out_dir).checkpoint("last").exists()
    # Later jobs do not begin.
    again = executor.run(Job("train", config), print)
    assert again.status == "interrupted"


def test_a_signal_stops_a_measurement(tiny_config: MakeConfig) -> None:
    def answer(job: Job) -> Outcome:
        os.kill(os.getpid(), signal.SIGTERM)
        return Outcome("interrupted", "stopped")

    executor = InProcess(answer)
    with pytest.raises(Interrupted) as stop:
        run_interruptibly(executor, Job("measure", tiny_config()))
    assert executor.stopped and stop.value.exit_code == 128 + signal.SIGTERM


# Other executors: what a cluster would need is one class


class Pool:
    """Some jobs at a time, each carried out here as a cluster would on its machines."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.together = 0
        self.most_together = 0
        self.stopped = threading.Event()
        self._training = threading.Lock()  # torch is one for all threads
        self._full = threading.Barrier(slots)

    def run(self, job: Job, on_event: OnEvent) -> Outcome:
        self.together += 1
        self.most_together = max(self.most_together, self.together)
        try:
            self._full.wait(60)  # for the others to come
            with self._training:
                return perform(job, on_event)
        finally:
            self.together -= 1

    def stop(self) -> None:
        self.stopped.set()


def losses(planned: list[PlannedRun]) -> list[list[float]]:
    return [
        [row.loss for row in RunFolder(run.folder).read_rows() if isinstance(row, IterationRow)]
        for run in planned
    ]


@pytest.mark.slow
def test_a_whole_experiment_runs_on_another_executor(
    dataset: Dataset, planned: list[PlannedRun], tmp_path: Path
) -> None:
    """Two runs at a time, to the bits of one after the other in processes."""
    pool, watcher = Pool(2), Watcher()
    assert run_experiment(planned, pool, watcher) == ["finished"] * 4
    assert pool.most_together == 2 and len(watcher.lines) == 4
    experiment = load_experiment(tmp_path / "a.toml")
    others = plan_runs(experiment, dataset, tmp_path / "others", seeds=(1,))
    run_experiment(others, LocalExecutor(), Watcher())
    assert losses(planned[:2]) == losses(others)


class Endless(Pool):
    """Jobs that end when they are stopped."""

    def run(self, job: Job, on_event: OnEvent) -> Outcome:
        if self._full.wait(60) == 0:  # one of the threads
            os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 60
        # Python hears a signal that comes just before a wait only when that wait is over.
        while not self.stopped.wait(0.1):
            assert time.monotonic() < deadline
        return Outcome("interrupted", "stopped")


def test_a_signal_stops_all_runs_that_are_under_way(planned: list[PlannedRun]) -> None:
    started = time.monotonic()
    with pytest.raises(Interrupted, match="the experiment was stopped") as stop:
        run_experiment(planned, Endless(2), Watcher())
    assert stop.value.signal_number == signal.SIGTERM
    assert time.monotonic() - started < 60


def test_a_fault_of_ours_leaves_no_job_behind(planned: list[PlannedRun]) -> None:
    executor = InProcess(lambda job: (_ for _ in ()).throw(AssertionError("ours")))
    with pytest.raises(AssertionError, match="ours"):
        run_experiment(planned, executor, Watcher())
    assert executor.stopped
