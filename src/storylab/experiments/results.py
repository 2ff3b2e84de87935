"""What a run folder says about its run, read so that a damaged one is told of rather than trusted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from storylab.config import TrainConfig
from storylab.errors import UserError
from storylab.files import exists, read_record, reading
from storylab.record import (
    DataRecord,
    EnvironmentRecord,
    FailureRecord,
    PrecisionRecord,
)
from storylab.training.run_folder import (
    CONFIG,
    METRICS,
    POSITION_LOSSES,
    PRECISION,
    STORY_LOSSES,
    SUMMARY,
    Run,
    open_run,
    read_table,
)

ENDED = ("finished", "diverged")
# Written by whoever ran a run that failed before it could write down anything itself.
FAILURE = "failure.json"


@dataclass(frozen=True)
class Result:
    """A run that has a readable config: its state, and for a finished one its numbers."""

    folder: Path
    state: str
    reason: str
    config: TrainConfig
    data: DataRecord
    environment: EnvironmentRecord
    summary: dict[str, Any]
    """Empty if the run has not ended."""
    story_losses: np.ndarray
    """Nats and predicted tokens of every validation story, ``[stories, 2]``; empty if unfinished."""

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end."""
        return self.state == "finished"

    @property
    def loss(self) -> float:
        """Loss on the whole validation split under the final weights; infinite if it diverged."""
        if not self.finished:
            return math.inf
        return float(self.summary["validation"]["loss"])

    @property
    def seeds(self) -> tuple[int, int]:
        """Seeds of the initial weights and of the data order: what two paired runs share."""
        return self.config.seed, self.config.resolved_data_seed

    @property
    def stages(self) -> list[Mapping[str, Any]]:
        """The environment it was started in, and those it was resumed in."""
        return [self.environment, *self.environment.get("resumed", [])]

    @property
    def code_versions(self) -> set[str]:
        """Versions of the code that it was trained by, more than one if it was resumed by another."""
        return {stage["code_sha256"] for stage in self.stages}

    @cached_property
    def speed(self) -> float | None:
        """Tokens a second of the median iteration, which a burst of other work on the machine
        leaves alone; the first one, which warms up, is left out."""
        seconds = [row["step_seconds"] for row in self.iterations[1:] or self.iterations]
        if not seconds:
            return None
        return self.config.tokens_per_iteration / float(np.median(seconds))

    @cached_property
    def training_memory(self) -> int | None:
        """Peak memory in bytes of training steps: before the first evaluation, whose batches are of
        another size than training's."""
        first = min((e["iteration"] for e in self.evaluations), default=None)
        rows = [r for r in self.iterations if first is None or r["iteration"] < first]
        return rows[-1]["peak_memory_bytes"] if rows else None

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return int(self.summary["parameters"])

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of ``metrics.jsonl``."""
        return Run(self.folder).metrics

    @cached_property
    def iterations(self) -> list[dict[str, Any]]:
        """Metrics of every iteration."""
        return [row for row in self.metrics if row["kind"] == "iteration"]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Metrics of every evaluation, with the tokens, training seconds and joules until then."""
        seconds = np.cumsum([row["step_seconds"] for row in self.iterations])
        rows = []
        for row in self.metrics:
            # An evaluation of iteration i comes before that iteration: i updates are done.
            done = row["iteration"]
            if row["kind"] == "evaluation" and 0 < done <= len(seconds):
                last = self.iterations[done - 1]
                extra = {
                    "tokens": last["tokens"],
                    "seconds": float(seconds[done - 1]),
                    "energy_joules": last["energy_joules"],
                }
                rows.append(row | extra)
        return rows

    @cached_property
    def quantization(self) -> list[dict[str, Any]]:
        """What quantisation did to each tensor, where the run recorded it."""
        return [row for row in self.metrics if row["kind"] == "quantization"]

    @cached_property
    def position_losses(self) -> np.ndarray:
        """Mean nats of the targets at each position of a window; empty if there are none."""
        path = self.folder / POSITION_LOSSES
        return read_table(path, dimensions=1) if exists(path) else np.empty(0)


def run_folders(runs: Path) -> list[Path]:
    """Folders in ``runs`` that hold a run or what is left of one, and those that cannot be looked into.

    Raises:
        UserError: ``runs`` itself cannot be read.
    """
    with reading(runs):
        entries = sorted(runs.iterdir())
    return [entry for entry in entries if _may_be_run(entry)]


def _may_be_run(entry: Path) -> bool:
    try:
        return any(exists(entry / name) for name in (CONFIG, SUMMARY, FAILURE))
    except UserError:
        return True


def run_state(folder: Path) -> tuple[str, str]:
    """State of a run folder and the reason for it, whatever is left in the folder."""
    try:
        with reading(folder):
            if exists(folder) and not folder.is_dir():
                return "damaged", f"{folder} is not a folder"
        summary = Run(folder).summary
        if summary is not None:
            return summary["status"], summary.get("reason", "")
        if exists(folder / FAILURE):
            failure = read_record(folder / FAILURE, FailureRecord)
            return "failed", f"{failure['outcome']}: {failure['reason']}"
        return ("unfinished", "") if exists(folder / CONFIG) else ("new", "")
    except UserError as error:
        return "damaged", str(error)


def load_result(folder: Path) -> Result:
    """Read a run folder, and all that a comparison or a report will ask of it.

    Raises:
        UserError: there is no run, or something in it is damaged.
    """
    run = open_run(folder)
    state, reason = run_state(folder)
    if state == "damaged":
        raise UserError(reason if str(folder) in reason else f"{folder} is damaged: {reason}")
    stories = read_table(folder / STORY_LOSSES, 2) if state == "finished" else np.empty((0, 2))
    result = Result(
        folder=folder,
        state=state,
        reason=reason,
        config=run.config,
        data=run.data,
        environment=run.environment,
        summary=dict(run.summary or {}),
        story_losses=stories,
    )
    if fault := next(_faults(result), None):
        raise UserError(f"{folder} is damaged: {fault}")
    if exists(folder / PRECISION):
        read_record(folder / PRECISION, PrecisionRecord)
    return result


def _faults(result: Result) -> Iterator[str]:
    """Where the files of a run do not fit together."""
    for number, row in enumerate(result.iterations):
        if row["iteration"] != number:
            yield f"{METRICS} has iteration {row['iteration']} where {number} should be"
    if not result.finished:
        return
    summary, stories = result.summary, result.story_losses
    if len(result.iterations) != summary["iterations"]:
        yield f"{METRICS} has {len(result.iterations)} of its {summary['iterations']} iterations"
    validation = summary["validation"]
    if (
        stories.shape != (validation["stories"], 2)
        or not (stories[:, 1] > 0).all()
        or not math.isclose(
            float(stories[:, 0].sum() / stories[:, 1].sum()), validation["loss"], rel_tol=1e-9
        )
    ):
        yield f"{STORY_LOSSES} is not that of its summary"
    # Runs from before windows were recorded may have no losses by position either.
    positions, known = len(result.position_losses), validation.get("block_size")
    if positions != known and (known is not None or positions):
        yield f"{POSITION_LOSSES} has {positions} positions of {known}"
