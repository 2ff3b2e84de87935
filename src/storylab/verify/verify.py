"""Verify runs, data sets and experiments: every check, and all that they find."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storylab.checksums import CHECKSUMS
from storylab.data.dataset import MANIFEST, TOKENIZER_FILE
from storylab.errors import UserError
from storylab.experiments.records import FolderCache
from storylab.files import exists
from storylab.record.folder import (
    CONFIG,
    DATA,
    ENVIRONMENT,
    FAILURE,
    LOG,
    METRICS,
    POSITION_LOSSES,
    PRECISION,
    STORY_LOSSES,
    SUMMARY,
    TEST_LOSSES,
)
from storylab.verify.checks import DATA_CHECKS, EXPERIMENT_CHECKS, RUN_CHECKS
from storylab.verify.data_sets import DataSets, DataSubject, files_in
from storylab.verify.experiments import ExperimentSubject
from storylab.verify.findings import (
    Check,
    Depth,
    Difference,
    Gap,
    Progress,
    Subject,
    fault_difference,
    included,
)
from storylab.verify.run_files import RunSubject

Kind = Literal["run", "data set", "experiment"]
# Messages also name the file with the checksums, so it is the last one to look for.
FILES = (
    *(TEST_LOSSES, STORY_LOSSES, POSITION_LOSSES, METRICS, LOG, SUMMARY, PRECISION, ENVIRONMENT),
    *(FAILURE, CONFIG, DATA, TOKENIZER_FILE, MANIFEST, CHECKSUMS),
)


@dataclass(frozen=True)
class Verified:
    """A run, a data set or an experiment that was verified.

    Attributes:
        path: its folder or file.
        kind: which of the three.
        checks: names of the checks, in order.
        differences: the name of a check with each difference that it found.
        gaps: the name of a check with each thing that it could not check.
    """

    path: Path
    kind: Kind
    checks: tuple[str, ...]
    differences: tuple[tuple[str, Difference], ...]
    gaps: tuple[tuple[str, Gap], ...]


@dataclass(frozen=True)
class Verifier:
    """Verifies folders and experiments at one depth.

    Attributes:
        depth: see :class:`storylab.verify.findings.Check`.
        data_dir: the data set of the runs, if it has moved.
        device: see :class:`storylab.verify.run_files.RunSubject`.
        progress: shows how far long work is.
    """

    depth: Depth
    data_dir: Path | None
    device: str | None
    progress: Progress

    def __call__(
        self, folders: Sequence[Path], records: Iterable[Path] = (), with_data: bool = False
    ) -> Iterator[Verified]:
        """Verify runs and data sets, then the data sets of those runs, then experiments.

        Args:
            folders: run folders and folders of data sets.
            records: records of experiments.
            with_data: whether to verify the data sets of the runs as well.

        Raises:
            UserError: there is no run and no data set in one of the folders, or no such device.
        """
        data, cache = DataSets(), FolderCache()
        used: dict[Path, None] = {}
        for done, folder in enumerate(folders):
            self.progress("verifying", done, len(folders))
            if exists(folder / MANIFEST):
                used.pop(folder, None)
                yield self._data_set(folder, data)
                continue
            subject = RunSubject(
                folder, self.depth, data, self.data_dir, self.device, self.progress
            )
            if not (subject.began or exists(folder / FAILURE)):
                raise UserError(f"{folder} is neither a run folder nor a data set: check the path")
            checks = RUN_CHECKS if subject.began else RUN_CHECKS[:1]
            yield self._verified("run", folder, checks, subject, FILES)
            if with_data and subject.began:
                used |= dict.fromkeys(_data_folder(subject))
        for folder in used:
            if folder not in folders:
                yield self._data_set(folder, data)
        for path in records:
            experiment = ExperimentSubject(path, cache)
            yield self._verified("experiment", path, EXPERIMENT_CHECKS, experiment, (path.name,))

    def _data_set(self, folder: Path, data: DataSets) -> Verified:
        manifest = data.manifest(folder)
        names = () if isinstance(manifest, UserError) else tuple(files_in(manifest))
        subject = DataSubject(folder, data)
        return self._verified("data set", folder, DATA_CHECKS, subject, (*names, *FILES))

    def _verified(
        self,
        kind: Kind,
        path: Path,
        checks: Sequence[Check[Subject]],
        subject: Subject,
        files: tuple[str, ...],
    ) -> Verified:
        """Every check of a subject. A fault that keeps several checks from their work is named once."""
        differences: dict[Difference, str] = {}
        gaps: dict[Gap, str] = {}
        chosen = [check for check in checks if included(self.depth, check.depth)]
        for check in chosen:
            try:
                for finding in check.find(subject):
                    if isinstance(finding, Gap):
                        gaps.setdefault(finding, check.name)
                    else:
                        differences.setdefault(finding, check.name)
            except UserError as error:
                differences.setdefault(fault_difference(error, files), check.name)
        return Verified(
            path,
            kind,
            tuple(check.name for check in chosen),
            tuple((name, difference) for difference, name in differences.items()),
            tuple((name, gap) for gap, name in gaps.items()),
        )


def _data_folder(subject: RunSubject) -> Iterator[Path]:
    try:
        yield subject.data_folder
    except UserError:
        return  # the run has been reported as damaged
