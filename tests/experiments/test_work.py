"""Workers train a registered experiment together, to what `experiment run` makes of it alone."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import experiment_folder
from damage import change
from executors import InProcess, Unused, perform_quietly
from reporters import Quiet, Watcher
from samples import TWO_RATES
from storylab.cli import main
from storylab.data.dataset import Dataset
from storylab.execution.job import Job, Outcome
from storylab.experiments.leases import lease_folder
from storylab.experiments.machines import class_here
from storylab.experiments.queue import queued_records, recorded_experiment
from storylab.experiments.records import FolderCache
from storylab.experiments.spec import load_experiment
from storylab.experiments.watching import watch_tables
from storylab.experiments.work import WorkOptions, work
from storylab.leases import Claimant
from storylab.record.folder import FAILURE, RunFolder
from storylab.record.schema import IterationRow

# Everything is equivalent at the first look, so the third seed is not trained.
WIDE = TWO_RATES.replace("margin = 0.02", "margin = 5.0")


class Bench(experiment_folder.Bench):
    """Registers experiments and works on them, in this process."""

    def register(self, text: str = TWO_RATES, *flags: str, name: str = "rates") -> str:
        self.write(text, name)
        code, out, err = self.call("run", "--register", *flags, name=name, executor=Unused())
        assert code == 0, err
        return out

    def work(self, *flags: str, executor: InProcess | None = None) -> tuple[int, str, str]:
        code = main(["work", str(self.runs), *flags], executor=executor or InProcess())
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err


@pytest.fixture
def bench(tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, dataset, capsys)


def losses(folder: Path) -> dict[str, list[float]]:
    """The losses of every run in a folder, by the run's name."""
    return {
        run.name: [r.loss for r in RunFolder(run).read_rows() if isinstance(r, IterationRow)]
        for run in sorted(folder.glob("nano-*"))
    }


def failing(job: Job) -> Outcome:
    return Outcome("failed", "no such luck")


def test_registering_trains_nothing_and_plans_the_first_look(bench: Bench) -> None:
    out = bench.register(TWO_RATES, "--seeds", "3", "--only", "low", "high")
    assert "registered before any run" in out and f"storylab work {bench.runs}" in out
    record = bench.read_record()
    assert record.queued is not None
    assert (record.queued.seeds, record.queued.arms) == ([1, 2, 3], ["low", "high"])
    assert [sorted(cell.runs) for cell in record.cells] == [["1", "2"], ["1", "2"]]
    assert not list(bench.runs.glob("nano-*"))
    bench.register(TWO_RATES, "--seeds", "3")
    assert bench.read_record().amendments == []


@pytest.mark.parametrize("flag", ["--json", "--dry_run", "--fresh"])
def test_registering_goes_with_no_flag_for_training(bench: Bench, flag: str) -> None:
    bench.write()
    code, _, err = bench.call("run", "--register", flag, executor=Unused())
    assert code == 2 and "--register" in err and err.count("\n") == 1


def test_the_experiment_is_read_from_its_record(bench: Bench, dataset: Dataset) -> None:
    bench.register()
    ((path, record),) = queued_records(bench.runs, FolderCache())
    found, wanted = recorded_experiment(record), load_experiment(bench.root / "rates.toml")
    assert found.label == wanted.label == path.stem
    for field in dataclasses.fields(wanted):
        if field.name not in ("data", "cells"):
            assert getattr(found, field.name) == getattr(wanted, field.name)


@pytest.mark.slow
def test_a_worker_does_what_experiment_run_does(bench: Bench) -> None:
    """The same runs to the same losses, the same looks, the same arms settled and not trained further."""
    text = WIDE.replace("high = {", "same = { learning_rate = 1.0001e-3 }\nhigh = {")
    bench.register(text, "--seeds", "3")
    code, out, err = bench.work()
    assert code == 0, err
    assert "Look at 2 seeds:" in out and "not trained with more seeds: high, same" in out
    worked, theirs = bench.read_record(), losses(bench.runs)
    bench.runs = bench.root / "alone"
    bench.call("run", "--seeds", "3")
    alone = bench.read_record()
    assert theirs == losses(bench.runs) and len(theirs) == 6
    assert [(look.seeds, look.settled) for look in worked.looks_taken] == [
        (look.seeds, look.settled) for look in alone.looks_taken
    ]
    assert [cell.runs for cell in worked.cells] == [cell.runs for cell in alone.cells]
    assert worked.amendments == alone.amendments == []


@pytest.mark.slow
def test_a_worker_with_nothing_left_to_do_ends(bench: Bench) -> None:
    bench.register()
    assert bench.work()[0] == 0
    looks = bench.read_record().looks_taken
    code, out, _ = bench.work(executor=Unused())
    assert code == 0 and "trained 0 runs" in out
    assert bench.read_record().looks_taken == looks
    (table,) = watch_tables(bench.runs)
    assert "4 of 4 runs done" in table.title and "core-hours so far" in table.title


@pytest.mark.slow
def test_a_damaged_run_is_found_before_the_look_and_trained_again(bench: Bench) -> None:
    bench.register()
    damaged: list[Path] = []

    def answer(job: Job) -> Outcome:
        outcome = perform_quietly(job)
        if not damaged:
            assert job.config.out_dir is not None
            damaged.append(job.config.out_dir / "story_losses.npy")
            damaged[0].write_bytes(damaged[0].read_bytes()[:-1] + b"!")
        return outcome

    executor = InProcess(answer)
    assert bench.work(executor=executor)[0] == 0
    assert len(executor.jobs) == 5
    assert len(list(bench.runs.glob("nano-*.old1"))) == 1
    assert [look.seeds for look in bench.read_record().looks_taken] == [2]


def test_a_failed_run_is_a_result_until_somebody_asks_to_try_again(bench: Bench) -> None:
    bench.register(TWO_RATES, "--seeds", "1")
    executor = InProcess(failing)
    assert bench.work(executor=executor)[0] == 0
    assert len(executor.jobs) == 2
    assert len(list(bench.runs.glob(f"nano-*/{FAILURE}"))) == 2
    assert bench.work(executor=Unused())[0] == 0
    executor = InProcess(failing)
    bench.work("--retry", executor=executor)
    assert len(executor.jobs) == 2


def test_a_machine_on_which_everything_fails_stops(bench: Bench) -> None:
    bench.register(TWO_RATES, "--seeds", "3")
    executor = InProcess(failing)
    code, out, _ = bench.work(executor=executor)
    assert code == 1 and "this machine may be at fault" in out
    assert len(executor.jobs) == 3


def test_seeds_that_another_kind_of_machine_began_are_left_to_it(bench: Bench) -> None:
    bench.register(TWO_RATES, "--seeds", "2")
    change(bench.record_path(), machines={"1": "a pocket calculator"})
    executor = InProcess(failing)
    code, out, _ = bench.work(executor=executor)
    assert code == 0 and "low, seed 1 is left to a machine like a pocket calculator" in out
    assert [job.config.seed for job in executor.jobs] == [2, 2]
    record = bench.read_record()
    assert record.machines == {"1": "a pocket calculator", "2": class_here("cpu")}
    executor = InProcess(failing)
    bench.work("--any_machine", executor=executor)
    assert [job.config.seed for job in executor.jobs] == [1, 1]


def test_other_code_or_data_is_named_and_nothing_is_trained(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.register()
    bench.dataset.folder.rename(bench.root / "moved")
    try:
        code, out, _ = bench.work(executor=Unused())
        assert code == 1 and "rates cannot be trained here: its data (fingerprint" in out
        executor = InProcess(failing)
        bench.work("--data_dir", str(bench.root / "moved"), executor=executor)
        assert {job.config.data_dir for job in executor.jobs} == {bench.root / "moved"}
    finally:
        (bench.root / "moved").rename(bench.dataset.folder)
    monkeypatch.setattr("storylab.experiments.queue.code_sha256", lambda: "f" * 64)
    code, out, _ = bench.work("--retry", executor=Unused())
    assert code == 1 and "here is ffffffff, whose numbers may differ" in out


def test_a_worker_that_lost_its_lease_writes_nothing(bench: Bench) -> None:
    """Its job ends before it makes the run folder, and the run is left to whoever has it now."""
    bench.register(TWO_RATES, "--seeds", "1")
    robbed: list[Path] = []

    def answer(job: Job) -> Outcome:
        assert job.config.out_dir is not None
        if not robbed:
            robbed.append(job.config.out_dir)
            (lease_folder(job.config.out_dir) / "99").touch()  # as a later holder would
            outcome = perform_quietly(job)
            assert outcome.status == "interrupted" and "taken over" in outcome.reason
            assert not job.config.out_dir.exists()
            return outcome
        return failing(job)

    executor, watcher = InProcess(answer), Watcher()
    done = work(bench.runs, executor, watcher)
    assert any("has taken over" in line for line in watcher.lines)
    assert done.trained == 2 and len(executor.jobs) == 3


@pytest.mark.slow
def test_a_run_stops_before_its_next_row_once_its_lease_is_lost(bench: Bench) -> None:
    """As after a long suspension: what was written before stays, and nothing comes after."""
    bench.register(TWO_RATES, "--seeds", "1", "--only", "low")
    claimant = Claimant(expiry=0.0)  # renewed before every write

    def answer(job: Job) -> Outcome:
        folder = job.config.out_dir
        assert folder is not None

        def rob(event: object) -> None:
            if getattr(event, "name", "") == "training":
                (lease_folder(folder) / "99").touch()

        from storylab.execution.worker import perform

        outcome = perform(job, rob)
        assert outcome.status == "interrupted"
        rows = RunFolder(folder).read_rows()
        assert len([row for row in rows if isinstance(row, IterationRow)]) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(bench.runs, InProcess(answer), Quiet(), claimant=claimant)


def test_workers_share_the_runs_and_one_of_them_judges(bench: Bench) -> None:
    """Without locks, as on different machines: every run is trained once, and every look is noted once."""
    bench.register(TWO_RATES, "--seeds", "3")
    trained: list[Path] = []

    def answer(job: Job) -> Outcome:
        assert job.config.out_dir is not None
        trained.append(job.config.out_dir)
        time.sleep(0.05)
        return Outcome("failed", "for speed")

    def worker() -> None:
        options = WorkOptions()
        work(bench.runs, InProcess(answer), Quiet(), options, Claimant(locks=False))

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trained) == len(set(trained)) == 6


@pytest.mark.posix
@pytest.mark.slow
def test_three_workers_and_a_kill_give_what_one_process_gives(bench: Bench) -> None:
    text = TWO_RATES.replace("max_iters = 3", "max_iters = 120")
    text = text.replace("eval_interval = 3", "eval_interval = 40")
    bench.register(text, "--seeds", "2")
    command = [sys.executable, "-m", "storylab", "work", str(bench.runs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    deadline = time.monotonic() + 600
    while not list(bench.runs.glob("nano-*/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pids = {
        json.loads(ticket.read_text().splitlines()[0])["pid"]
        for ticket in bench.runs.glob(".locks/nano-*/[0-9]*")
        if ticket.stat().st_size
    }
    victim = next(worker for worker in workers if worker.pid in pids)
    victim.send_signal(signal.SIGKILL)
    for worker in workers:
        worker.communicate(timeout=1200)
    assert sorted(worker.returncode for worker in workers) == [-signal.SIGKILL, 0, 0]
    record, theirs = bench.read_record(), losses(bench.runs)
    bench.runs = bench.root / "alone"
    bench.call("run", "--seeds", "2")
    assert theirs == losses(bench.runs) and len(theirs) == 4
    looks, alone = record.looks_taken, bench.read_record().looks_taken
    assert [(look.seeds, look.settled) for look in looks] == [
        (look.seeds, look.settled) for look in alone
    ]
