"""What a run folder says about its run, read so that a damaged one is told of rather than trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from storylab.config import TrainConfig
from storylab.errors import UserError
from storylab.files import read_json
from storylab.training.run_folder import (
    CONFIG,
    POSITION_LOSSES,
    STORY_LOSSES,
    SUMMARY,
    Run,
    open_run,
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
    data: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
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
    def stages(self) -> list[dict[str, Any]]:
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
        try:
            return np.load(self.folder / POSITION_LOSSES, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return np.empty(0)


def run_state(folder: Path) -> tuple[str, str]:
    """State of a run folder and the reason for it, whatever is left in the folder."""
    try:
        if (folder / SUMMARY).exists():
            summary = read_json(folder / SUMMARY)
            return str(summary["status"]), str(summary.get("reason", ""))
        if (folder / FAILURE).exists():
            failure = read_json(folder / FAILURE)
            return "failed", f"{failure['outcome']}: {failure['reason']}"
    except (UserError, KeyError, TypeError) as error:
        return "damaged", str(error)
    return ("unfinished", "") if (folder / CONFIG).exists() else ("new", "")


def load_result(folder: Path) -> Result:
    """Read a run folder.

    Raises:
        UserError: there is no run, or what is there is damaged.
    """
    run = open_run(folder)
    state, reason = run_state(folder)
    if state == "damaged":
        raise UserError(f"{folder} is damaged: {reason}")
    try:
        summary = run.summary or {}
        stories = np.empty((0, 2))
        if state == "finished":
            stories = np.load(folder / STORY_LOSSES, allow_pickle=False)
            validation = summary["validation"]
            total = float(stories[:, 0].sum() / stories[:, 1].sum())
            if len(stories) != validation["stories"] or not math.isclose(
                total, validation["loss"], rel_tol=1e-9
            ):
                raise UserError(f"{folder} is damaged: {STORY_LOSSES} is not that of its summary")
        result = Result(
            folder, state, reason, run.config, run.data, run.environment, summary, stories
        )
        # Everything a comparison will ask of it, now rather than in the middle of a report.
        _ = result.evaluations, result.code_versions, result.data["fingerprint"]
        _ = [stage["packages"]["torch"] for stage in result.stages]
        if state == "finished":
            _ = result.parameters, result.speed, result.training_memory
            if len(result.iterations) != summary["iterations"]:
                raise UserError(
                    f"{folder} is damaged: it has metrics of {len(result.iterations)} of its "
                    f"{summary['iterations']} iterations"
                )
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        EOFError,
    ) as error:
        if isinstance(error, UserError):
            named = str(folder) in str(error)
            raise error if named else UserError(f"{folder}: {error}") from error
        raise UserError(f"{folder} is damaged: {type(error).__name__} {error}") from error
    return result
