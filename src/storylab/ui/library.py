"""A folder of runs as the page shows it. Nothing here writes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from msgspec import structs

from storylab.config import PRESENTATION_FIELDS, flat
from storylab.errors import UserError
from storylab.experiments.factors import qualified_name
from storylab.experiments.records import FolderCache, experiment_records
from storylab.files import exists
from storylab.locks import held
from storylab.record.experiment_schema import ExperimentRecord
from storylab.record.folder import METRICS, SUMMARY, RunFolder, open_run
from storylab.record.index import RunEntry, list_run, run_folders
from storylab.record.run import DAMAGED, ENDED, FAILED, run_state
from storylab.reporting.report import experiment_page
from storylab.training.log_format import format_duration
from storylab.ui.course import Course
from storylab.ui.views import Curve, Detail, ExperimentRow, Overview, RunRow

MOST_COURSES = 256
Stamp = tuple[int, ...]


class Library:
    """The runs and experiments of a folder. A file is read again only when it has changed.

    Methods may be called from several threads.

    Args:
        folder: holds the run folders.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._entries: dict[str, tuple[Stamp, RunEntry]] = {}
        self._courses: OrderedDict[str, Course] = OrderedDict()
        self._pages: dict[str, tuple[Stamp, str]] = {}
        self._cache = FolderCache()

    def overview(self) -> Overview:
        """Every run and experiment.

        Raises:
            UserError: the folder cannot be read.
        """
        with self._lock:
            records, arms = experiment_records(self.folder), dict[str, str]()
            for path in records:
                with suppress(UserError):  # its row says why
                    arms = _arms(self._cache.record(path)) | arms
            runs = [
                structs.replace(self._row(folder), arm=arms.get(folder.name, ""))
                for folder in run_folders(self.folder)
            ]
            states = {row.name: row.state for row in runs}
            experiments = [self._experiment(path, states) for path in records]
            return Overview(folder=str(self.folder), runs=runs, experiments=experiments)

    def curve(self, name: str) -> Curve:
        """The course of a run so far.

        Raises:
            UserError: there is no such run, or it is damaged.
        """
        with self._lock:
            return self._course(self._run(name)).curve(name)

    def detail(self, name: str) -> Detail:
        """Settings and stories of a run.

        Raises:
            UserError: there is no such run, or it is damaged.
        """
        with self._lock:
            run = open_run(self._run(name))
            config, environment, summary = (
                run.read_config(),
                run.read_environment(),
                run.read_summary(),
            )
            facts = [
                ("started", environment.started),
                ("machine", f"{environment.gpu or environment.cpu}, {environment.threads} threads"),
                ("torch", environment.packages.torch),
                ("code", environment.code_sha256[:12]),
                ("command", " ".join(environment.command)),
            ]
            if summary is not None:
                facts.append(("training time", format_duration(summary.training_seconds)))
                if summary.energy_joules is not None:
                    facts.append(("energy", f"{summary.energy_joules / 3600:,.1f} Wh"))
                if summary.reason:
                    facts.append(("reason", summary.reason))
            return Detail(
                name=name,
                config=flat(config, PRESENTATION_FIELDS),
                facts=facts,
                samples=summary.samples if summary else [],
            )

    def experiment_page(self, name: str, bundle: str) -> str:
        """The page of an experiment, from its runs as they are now.

        Args:
            name: of its record.
            bundle: address of the script that draws the figures.

        Raises:
            UserError: there is no such experiment, or its record is damaged.
        """
        with self._lock:
            records = {path.stem: path for path in experiment_records(self.folder)}
            if name not in records:
                raise UserError(f"{self.folder} has no experiment '{name}'")
            path = records[name]
            runs = [self.folder / run for run in _run_names(self._cache.record(path))]
            stamp = _stamp(path, *(run / file for run in runs for file in (METRICS, SUMMARY)))
            if self._pages.get(name, ((), ""))[0] != stamp:
                self._pages[name] = stamp, experiment_page(path, self._cache, bundle)
            return self._pages[name][1]

    def _run(self, name: str) -> Path:
        """The folder of a run in the list, so that no name leads out of the folder."""
        for folder in run_folders(self.folder):
            if folder.name == name:
                return folder
        raise UserError(f"{self.folder} has no run '{name}'")

    def _row(self, folder: Path) -> RunRow:
        try:
            return self._known_row(folder)
        except UserError as error:
            return RunRow(name=folder.name, state=DAMAGED, fault=str(error))

    def _known_row(self, folder: Path) -> RunRow:
        if not exists(folder / SUMMARY):
            state, reason = run_state(folder)
            if state in (FAILED, DAMAGED):
                return RunRow(name=folder.name, state=state, fault=reason)
            return self._unfinished_row(folder)
        stamp = _stamp(folder, folder / SUMMARY)
        if self._entries.get(folder.name, ((),))[0] != stamp:
            self._entries[folder.name] = stamp, list_run(folder)
        entry = self._entries[folder.name][1]
        return RunRow(
            name=entry.name,
            state=entry.state,
            started=entry.started,
            parameters=entry.parameters,
            tokens=entry.tokens,
            loss=entry.loss,
            speed=entry.speed,
            memory=entry.memory,
        )

    def _unfinished_row(self, folder: Path) -> RunRow:
        run, course = RunFolder(folder), self._course(folder)
        config = run.read_config()
        last, evaluations = course.last, course.evaluations
        training = held(folder)
        done = last.iteration + 1 if last else 0
        left = (config.iterations - done) * last.step_seconds if last and training else None
        return RunRow(
            name=folder.name,
            state="training" if training else "stopped",
            started=run.read_environment().started,
            iteration=done,
            iterations=config.iterations,
            tokens=last.tokens if last else 0,
            loss=evaluations[-1].val_loss if evaluations else None,
            speed=last.tokens_per_second if last else None,
            memory=last.peak_memory_bytes if last else None,
            seconds_left=left,
        )

    def _course(self, folder: Path) -> Course:
        """The course of a run, up to date; those that nobody asked for lately are forgotten."""
        course = self._courses.setdefault(folder.name, Course(folder / METRICS))
        self._courses.move_to_end(folder.name)
        if len(self._courses) > MOST_COURSES:
            self._courses.popitem(last=False)
        course.update()
        return course

    def _experiment(self, path: Path, states: dict[str, str]) -> ExperimentRow:
        try:
            record = self._cache.record(path)
        except UserError as error:
            return ExperimentRow(name=path.stem, title=path.stem, fault=str(error))
        names = _run_names(record)
        done = sum(states.get(name) in ENDED for name in names)
        return ExperimentRow(name=path.stem, title=record.title, done=done, planned=len(names))


def _arms(record: ExperimentRecord) -> dict[str, str]:
    """Arm, condition and seed of every run, by the name of its folder."""
    return {
        name: f"{qualified_name(cell.arm, cell.condition)}, seed {seed}"
        for cell in record.cells
        for seed, name in cell.runs.items()
    }


def _run_names(record: ExperimentRecord) -> list[str]:
    return [name for cell in record.cells for name in cell.runs.values()]


def _stamp(*paths: Path) -> Stamp:
    """Times of the last change and sizes; zeros for what is missing."""
    numbers = []
    for path in paths:
        try:
            known = path.stat()
            numbers += [known.st_mtime_ns, known.st_size]
        except OSError:
            numbers += [0, 0]
    return tuple(numbers)
