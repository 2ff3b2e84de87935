"""A run as its folder records it: read once, validated, and the numbers that follow from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from storylab.checksums import Checksums
from storylab.config import TrainConfig
from storylab.errors import UserError
from storylab.files import exists, read_record, reading
from storylab.record.consistency import contradictions
from storylab.record.folder import (
    CONFIG,
    FAILURE,
    POSITION_LOSSES,
    PRECISION,
    STORY_LOSSES,
    TEST_LOSSES,
    RunFolder,
    open_checked,
)
from storylab.record.frame import RowKind, rows_frame
from storylab.record.schema import (
    DataInfo,
    Environment,
    EvaluationRow,
    Failure,
    IterationRow,
    PrecisionInfo,
    QuantizationRow,
    Row,
    SplitLoss,
    Stage,
    Summary,
)

# Reading a summary, as a listing does, imports neither numpy nor the data's modules.
if TYPE_CHECKING:
    import numpy as np
    import pandas

FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
UNFINISHED, NEW, DAMAGED = "unfinished", "new", "damaged"
ENDED = (FINISHED, DIVERGED)


@dataclass(frozen=True)
class CurvePoint:
    """An evaluation along a run, with the tokens, training seconds and joules up to it."""

    iteration: int
    train_loss: float
    val_loss: float
    tokens: int
    seconds: float
    energy_joules: float | None


@dataclass(frozen=True)
class Run:
    """A run that has a readable config. Nothing here reads a file."""

    folder: Path
    state: str
    """``finished``, ``diverged``, ``failed`` or ``unfinished``."""
    reason: str
    """Why it diverged or failed."""
    config: TrainConfig
    data: DataInfo
    environment: Environment
    summary: Summary | None
    """None if the run has not ended."""
    rows: Sequence[Row]
    story_losses: np.ndarray
    """Nats and predicted tokens of every validation story, float64 ``[stories, 2]``; empty unless it
    finished."""
    position_losses: np.ndarray
    """Mean nats of the targets at each position of a window, float64 ``[block_size]``; empty if there are
    none."""
    test_losses: np.ndarray
    """As ``story_losses``, of the test stories; empty if there are none. Only ``confirm`` may show it."""

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end."""
        return self.state == FINISHED

    @property
    def results(self) -> Summary:
        """The summary of a run that has ended."""
        assert self.summary is not None
        return self.summary

    @property
    def validation(self) -> SplitLoss:
        """Losses on the whole validation split under the final weights, of a finished run."""
        assert self.results.validation is not None
        return self.results.validation

    @property
    def loss(self) -> float:
        """Loss on the whole validation split under the final weights; infinite unless it finished."""
        return self.validation.loss if self.finished else math.inf

    @property
    def test_loss(self) -> float | None:
        """As ``loss``, on the whole test split; None without. Only ``confirm`` may show it."""
        return self.summary.test.loss if self.summary and self.summary.test else None

    @property
    def seeds(self) -> tuple[int, int]:
        """Seeds of the initial weights and of the data order, which two paired runs share."""
        return self.config.seed, self.config.resolved_data_seed

    @property
    def stages(self) -> list[Stage]:
        """The environment it was started in, and those it was resumed in."""
        return [self.environment, *self.environment.resumed]

    @property
    def code_versions(self) -> set[str]:
        """Versions of the code that trained it; versions that give equal bits count as one."""
        from storylab.record.provenance import representative

        return {representative(stage.code_sha256) for stage in self.stages}

    @cached_property
    def speed(self) -> float | None:
        """See :func:`median_speed`."""
        return median_speed(self.rows, self.config.tokens_per_iteration)

    @cached_property
    def training_memory(self) -> int | None:
        """See :func:`training_memory`."""
        return training_memory(self.rows)

    @property
    def recoveries(self) -> int:
        """Steps that were skipped, and rewinds, where loss or gradients were not finite; 0 before the run
        has ended."""
        return self.summary.skipped_steps + len(self.summary.rewinds) if self.summary else 0

    @property
    def parameters(self) -> int:
        """Number of trained parameters, of a run that has ended."""
        return self.results.parameters

    @cached_property
    def iterations(self) -> list[IterationRow]:
        """Metrics of every iteration."""
        return [row for row in self.rows if isinstance(row, IterationRow)]

    @cached_property
    def evaluations(self) -> list[CurvePoint]:
        """The evaluations along the run."""
        import numpy as np

        seconds = np.cumsum([row.step_seconds for row in self.iterations])
        points = []
        for row in self.rows:
            # An evaluation of iteration i comes before that iteration: i updates are done.
            if isinstance(row, EvaluationRow) and 0 < row.iteration <= len(seconds):
                last = self.iterations[row.iteration - 1]
                spent = float(seconds[row.iteration - 1])
                losses = row.train_loss, row.val_loss
                points.append(
                    CurvePoint(row.iteration, *losses, last.tokens, spent, last.energy_joules)
                )
        return points

    @cached_property
    def quantization(self) -> list[QuantizationRow]:
        """Quantization statistics of each tensor, where the run recorded them."""
        return [row for row in self.rows if isinstance(row, QuantizationRow)]

    def frame(self, kind: RowKind = "iteration") -> pandas.DataFrame:
        """The rows of a kind as a dataframe; see :func:`storylab.record.frame.rows_frame`."""
        return rows_frame(self.rows, kind)


def median_speed(rows: Sequence[Row], tokens_per_iteration: int) -> float | None:
    """Tokens a second of the median iteration, on which a burst of other work on the machine has no effect.

    The first iteration, which warms up, is left out. None without iterations.
    """
    seconds = [row.step_seconds for row in rows if isinstance(row, IterationRow)]
    if not seconds:
        return None
    import numpy as np

    return tokens_per_iteration / float(np.median(seconds[1:] or seconds))


def training_memory(rows: Sequence[Row]) -> int | None:
    """Peak memory in bytes of training steps: before the first evaluation, whose batches have another size.

    None without such iterations.
    """
    evaluated = (row.iteration for row in rows if isinstance(row, EvaluationRow))
    # As for the curve, an evaluation before any update does not count.
    first = min((iteration for iteration in evaluated if iteration > 0), default=math.inf)
    peaks = [
        row.peak_memory_bytes
        for row in rows
        if isinstance(row, IterationRow) and row.iteration < first
    ]
    return peaks[-1] if peaks else None


def run_state(folder: Path) -> tuple[str, str]:
    """State of a run folder and the reason for it, for folders in any condition."""
    state, reason, _ = _state(RunFolder(folder))
    return state, reason


def _state(run: RunFolder) -> tuple[str, str, Summary | None]:
    folder = run.folder
    try:
        with reading(folder):
            if exists(folder) and not folder.is_dir():
                return DAMAGED, f"{folder} is not a folder", None
        summary = run.read_summary()
        if summary is not None:
            return summary.status, summary.reason, summary
        if exists(folder / FAILURE):
            failure = read_record(folder / FAILURE, Failure, run.check(FAILURE))
            return FAILED, f"{failure.outcome}: {failure.reason}", None
        return (UNFINISHED if exists(folder / CONFIG) else NEW), "", None
    except UserError as error:
        return DAMAGED, str(error), None


@dataclass(frozen=True)
class RunHead:
    """The two small files that decide which runs belong together, and the checksums of the folder."""

    config: TrainConfig
    data: DataInfo
    checksums: Checksums | None


def read_head(folder: Path) -> RunHead:
    """Read config and data of the run in ``folder``.

    Raises:
        UserError: there is no run, or one of the two is damaged.
    """
    run = open_checked(folder)
    return RunHead(run.read_config(), run.read_data(), run.checksums)


def load_run(folder: Path, head: RunHead | None = None) -> Run:
    """Read a run folder and validate it; each file is read once.

    Args:
        folder: the run folder.
        head: config and data, if they have been read already.

    Raises:
        UserError: there is no run, or its files are damaged or do not fit together.
    """
    run = RunFolder(folder, head.checksums) if head else open_checked(folder)
    state, reason, summary = _state(run)
    if state == DAMAGED:
        raise UserError(reason if str(folder) in reason else f"{folder} is damaged: {reason}")
    head = head or RunHead(run.read_config(), run.read_data(), run.checksums)
    import numpy as np

    none = np.empty((0, 2))
    loaded = Run(
        folder=folder,
        state=state,
        reason=reason,
        config=head.config,
        data=head.data,
        environment=run.read_environment(),
        summary=summary,
        rows=run.read_rows(),
        story_losses=run.read_array(STORY_LOSSES, 2) if state == FINISHED else none,
        position_losses=run.read_array(POSITION_LOSSES, 1)
        if exists(folder / POSITION_LOSSES)
        else np.empty(0),
        test_losses=run.read_array(TEST_LOSSES, 2) if summary and summary.test else none,
    )
    if fault := next(contradictions(loaded), None):
        raise UserError(f"{folder} is damaged: {fault}")
    if exists(folder / PRECISION):
        read_record(folder / PRECISION, PrecisionInfo, run.check(PRECISION))
    return loaded
