"""Many workers on one folder of runs, with kills: no run is trained by two of them at once.

    python benchmarks/workers.py --out OUT [--runs 200] [--workers 4] [--kills 20]

Training is made up: it takes a moment, ends with a copy of a run, and holds no lock. Workers use no
locks either and their leases expire after two seconds, so that they are to each other as on different
machines. Some are killed (SIGKILL) at random moments, and some are suspended for longer than a lease
lasts. The program checks from what the trainings wrote that no two of them overlapped, and prints a line
for docs/guide/machines.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import defaultdict
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path

from made_runs import Silent, finish, register, train_template
from storylab.execution.job import Job, OnEvent, Outcome
from storylab.experiments.work import work
from storylab.leases import Claimant, Fence, Lease, LeaseLost

EXPIRY = 2.0
TRAINING_SECONDS = 0.1
LOG = "log.jsonl"


class MadeUpTraining:
    """An executor that notes when a training begins, goes on and ends, each after a check of its fence."""

    slots = 1

    def __init__(self, template: Path, log: Path) -> None:
        self._template, self._log = template, log

    def run(self, job: Job, on_event: OnEvent) -> Outcome:
        """See :class:`storylab.execution.job.Executor`."""
        assert job.config.out_dir is not None
        name, fence = job.config.out_dir.name, Fence(Lease(**job.options["lease"]))
        try:
            for step in ("begin", "write", "write", "write"):
                fence.check()
                self._note(name, step)
                time.sleep(TRAINING_SECONDS / 4)
            fence.check()
            self._note(name, "end")
            finish(job.config, self._template)
        except LeaseLost as lost:
            return Outcome("interrupted", str(lost))
        return Outcome("done")

    def stop(self) -> None:
        """See :class:`storylab.execution.job.Executor`."""

    def _note(self, name: str, step: str) -> None:
        line = json.dumps([time.monotonic(), os.getpid(), name, step]) + "\n"
        with open(self._log, "a", encoding="utf-8") as file:
            file.write(line)  # one write, so that lines of several processes do not mix


def be_worker(place: Path) -> None:
    """Work until nothing is left."""
    executor = MadeUpTraining(place / "template", place / LOG)
    work(place / "runs", executor, Silent(), claimant=Claimant(EXPIRY, locks=False))


def start(place: Path) -> ForkProcess:
    """Start a worker as a process that has imported everything already."""
    worker = get_context("fork").Process(target=be_worker, args=(place,))
    worker.start()
    return worker


def disturb(workers: list[ForkProcess], place: Path, kills: int) -> int:
    """Kill and suspend workers at random, and start others for those killed; returns the suspensions."""
    chance, suspended, killed = random.Random(7), 0, 0
    asleep: dict[ForkProcess, float] = {}
    while any(worker.is_alive() for worker in workers):
        time.sleep(chance.uniform(0.05, 0.6))
        for worker, until in list(asleep.items()):
            if time.monotonic() > until:
                send(worker, signal.SIGCONT)
                del asleep[worker]
        awake = [worker for worker in workers if worker.is_alive() and worker not in asleep]
        if killed + suspended < kills and len(awake) > 1 and (place / LOG).exists():
            victim = chance.choice(awake)
            if chance.random() < 0.3:
                send(victim, signal.SIGSTOP)
                asleep[victim] = time.monotonic() + EXPIRY * chance.uniform(0.5, 3.0)
                suspended += 1
            else:
                send(victim, signal.SIGKILL)
                victim.join()
                workers.append(start(place))
                killed += 1
    return suspended


def send(worker: ForkProcess, number: int) -> None:
    """Send a signal to a worker that may have ended."""
    if worker.pid is not None:
        os.kill(worker.pid, number)


def overlaps(log: Path) -> tuple[int, int, list[str]]:
    """Trainings that began, those that ended, and the faults: a training went on although another process
    had begun to train the same run by then."""
    by_run: dict[str, list[tuple[float, int, str]]] = defaultdict(list)
    for line in log.read_text(encoding="utf-8").splitlines():
        moment, pid, name, step = json.loads(line)
        by_run[name].append((moment, pid, step))
    begun = ended = 0
    faults = []
    for name, events in by_run.items():
        owner = None
        for moment, pid, step in sorted(events):
            if step == "begin":
                owner, begun = pid, begun + 1
            elif pid != owner:
                faults.append(f"{name}: {pid} wrote at {moment:.3f} while {owner} trained it")
            ended += step == "end"
    return begun, ended, faults


def main() -> None:
    """Run the workers and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    planned = register(options.out, options.runs)
    train_template(planned[0].config, options.out / "template")
    started = time.monotonic()
    workers = [start(options.out) for _ in range(options.workers)]
    suspended = disturb(workers, options.out, options.kills)
    begun, ended, faults = overlaps(options.out / LOG)
    left = sum(run.read_state() != "finished" for run in planned)
    print(
        f"{len(planned)} runs, {options.workers} workers at a time, {options.kills - suspended} kills "
        f"and {suspended} suspensions: {begun} trainings begun, {ended} ended, {len(faults)} overlaps, "
        f"{left} runs left, {time.monotonic() - started:.0f} s"
    )
    for fault in faults:
        print(fault)
    sys.exit(bool(faults or left))


if __name__ == "__main__":
    main()
