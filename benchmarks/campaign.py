"""Seconds that keeping account of many runs takes: to register, claim, watch, judge and report them.

    python benchmarks/campaign.py --out OUT [--runs 1000] [--rows 1000]

The runs are copies of one real run with its record stretched to ``--rows`` iterations, and files linked, so
that the page cache holds all of them. Every number is the CPU time of this process, which other programs on
the machine do not lengthen, and after it the wall time.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from made_runs import Silent, finish, register, train_template
from storylab.execution.job import Job, OnEvent, Outcome
from storylab.experiments.outcome import load_outcome
from storylab.experiments.plan import PlannedRun
from storylab.experiments.records import FolderCache
from storylab.experiments.watching import watch_tables
from storylab.experiments.work import WorkOptions, work
from storylab.leases import Claimant
from storylab.reporting.report import write_report


class Enough(Exception):  # noqa: N818 - ends a measurement, no fault
    """The runs that a measurement needs are trained."""


class AtOnce:
    """An executor whose trainings end at once, up to a number of them.

    Args:
        template: the run that each becomes.
        most: number of trainings.
    """

    slots = 1

    def __init__(self, template: Path, most: int) -> None:
        self._template, self._left = template, most

    def run(self, job: Job, on_event: OnEvent) -> Outcome:
        """See :class:`storylab.execution.job.Executor`."""
        if self._left == 0:
            raise Enough
        self._left -= 1
        finish(job.config, self._template)
        return Outcome("done")

    def stop(self) -> None:
        """See :class:`storylab.execution.job.Executor`."""


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print the CPU seconds and wall seconds of the block."""
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    print(
        f"  {what:<58} {time.process_time() - cpu:8.2f} s CPU {time.perf_counter() - wall:8.2f} s",
        flush=True,
    )


def train_some(place: Path, most: int) -> None:
    """Let a new worker train ``most`` runs, and end when it has claimed the next one."""
    try:
        work(place / "runs", AtOnce(place / "template", most), Silent(), WorkOptions())
    except Enough:
        return


def fill(planned: list[PlannedRun], template: Path, share: float) -> None:
    """Finish a share of the runs, the first ones."""
    for run in planned[: round(len(planned) * share)]:
        if not run.folder.exists():
            finish(run.config, template)


def main() -> None:
    """Make the runs and print a line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1000)
    options = parser.parse_args()
    place, count, template = options.out, options.runs, options.out / "template"
    print(f"{count:,} runs of {options.rows:,} rows")
    with timed("register"):
        planned = register(place, count)
    record = place / "runs" / "experiments" / "many.json"
    print(f"  the record has {record.stat().st_size / 1e6:.2f} MB")
    train_template(planned[0].config, template, options.rows)
    with timed("a new worker: start, claim and end of 100 runs"):
        train_some(place, 100)
    fill(planned, template, 0.5)
    with timed("a new worker, half of the runs done: its first claim"):
        train_some(place, 0)
    held = [run.folder for run in planned[count // 2 : count // 2 + 100]]
    claimant = Claimant()
    with timed("100 claims"):
        for folder in held:
            with claimant.claim(folder.parent / ".locks" / folder.name) as lease:
                assert lease is not None
    fill(planned, template, 1.0)
    cache = FolderCache()
    for again in ("first", "again"):
        with timed(f"watch, {again}"):
            list(watch_tables(place / "runs", cache))
    cache = FolderCache()
    for again in ("first", "again"):
        with timed(f"judge, {again}"):
            load_outcome(record, cache)
    with timed("report, after judging"):
        write_report(place / "runs", place / "report", cache)
    print(f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
