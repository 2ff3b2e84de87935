"""Train one planned run to its end: attempts, and the remedies between them."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from storylab.checksums import add_checksums, drop_checksums
from storylab.config import TrainConfig
from storylab.execution.job import Job, Outcome, Status
from storylab.experiments.plan import PlannedRun
from storylab.files import exists, make_folder, reading, write_error, write_json
from storylab.record.folder import CONFIG, FAILURE, RunFolder

# Marks a run whose micro-batch was halved because memory was short.
MICROBATCH_NOTE = "split.json"


@dataclass(frozen=True)
class Attempt:
    """One try at a run.

    Attributes:
        config: the config of this try.
        resumes: whether an earlier try was killed and this one continues it.
        losses: how many tries before it lost their machine, without a new checkpoint between them.
        reached: time of the checkpoint of the last of those, in nanoseconds; 0 without one.
    """

    config: TrainConfig
    resumes: bool = False
    losses: int = 0
    reached: int = 0


# A run that loses its machine so often without a new checkpoint is given up.
MOST_LOSSES = 5
# The end of a folder's name that was set aside.
SET_ASIDE = re.compile(r"\.old\d+$", re.ASCII)

Remedy = Callable[[PlannedRun, Attempt, Outcome], tuple[Attempt, str] | None]
"""The next attempt after a failed one, and a line that says so; None where the remedy does not apply."""


def resume_once(run: PlannedRun, attempt: Attempt, outcome: Outcome) -> tuple[Attempt, str] | None:
    """Continue from the checkpoint, once: the process may have been killed for a reason outside the run."""
    if attempt.resumes or not exists(RunFolder(run.folder).checkpoint("last")):
        return None
    note = f"{outcome.reason}; going on from its checkpoint"
    return dataclasses.replace(attempt, resumes=True), note


def halve_micro_batch(
    run: PlannedRun, attempt: Attempt, outcome: Outcome
) -> tuple[Attempt, str] | None:
    """Start again with half the micro-batch and the same tokens an iteration."""
    config = attempt.config
    if config.batch_size % 2:
        return None
    if exists(run.folder / CONFIG):
        config = RunFolder(run.folder).read_config()
        set_aside(run.folder)
    config = dataclasses.replace(
        config,
        batch_size=config.batch_size // 2,
        gradient_accumulation_steps=config.gradient_accumulation_steps * 2,
        out_dir=run.folder,
    )
    note = (
        f"{outcome.reason or outcome.status}; again with micro-batches of {config.batch_size} "
        f"sequences, {config.gradient_accumulation_steps} of them an iteration (the same tokens)"
    )
    return dataclasses.replace(attempt, config=config), note


def go_on_elsewhere(
    run: PlannedRun, attempt: Attempt, outcome: Outcome
) -> tuple[Attempt, str] | None:
    """Continue from the checkpoint, or begin again, with the same config: the run is not to blame."""
    checkpoint = RunFolder(run.folder).checkpoint("last")
    reached = checkpoint.stat().st_mtime_ns if exists(checkpoint) else 0
    losses = attempt.losses + 1 if reached == attempt.reached else 1
    if losses > MOST_LOSSES:
        return None
    start = "from its checkpoint" if reached else "from the start"
    note = f"{outcome.reason}; going on {start}"
    return dataclasses.replace(attempt, losses=losses, reached=reached), note


# The remedies for each status, in the order in which they are tried. Any other status ends the run.
REMEDIES: Mapping[Status, tuple[Remedy, ...]] = {
    "out of memory": (halve_micro_batch,),
    "killed": (resume_once, halve_micro_batch),  # by the system perhaps, when memory is short
    "lost": (go_on_elsewhere,),
}


def train_run(
    run: PlannedRun, execute: Callable[[Job], Outcome], report: Callable[[str], None]
) -> None:
    """Train a run until it finishes, diverges, or no remedy is left; its folder keeps the result.

    Args:
        run: a run that has not ended; an unfinished one is continued.
        execute: carries out a job. Exceptions pass through and leave the run to be continued.
        report: called with a line before every further attempt.

    Raises:
        UserError: the run folder cannot be read or written.
    """
    drop_checksums(run.folder, [FAILURE])
    with reading(run.folder):
        (run.folder / FAILURE).unlink(missing_ok=True)
    attempt = Attempt(run.config)
    while True:
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        outcome = execute(Job("train", attempt.config))
        if outcome.status in ("done", "diverged"):
            _note_micro_batch(run, attempt)
            return
        further = _next_attempt(run, attempt, outcome)
        if further is None:
            make_folder(run.folder)
            failure = {"outcome": outcome.status, "reason": outcome.reason, "started": started}
            write_json(run.folder / FAILURE, failure)
            add_checksums(run.folder, [FAILURE])
            return
        attempt, note = further
        report(note)


def _next_attempt(
    run: PlannedRun, attempt: Attempt, outcome: Outcome
) -> tuple[Attempt, str] | None:
    remedies = REMEDIES.get(outcome.status, ())
    found = (remedy(run, attempt, outcome) for remedy in remedies)
    return next((further for further in found if further is not None), None)


def _note_micro_batch(run: PlannedRun, attempt: Attempt) -> None:
    planned, trained = run.config.batch_size, attempt.config.batch_size
    if trained != planned:
        write_json(run.folder / MICROBATCH_NOTE, {"asked": planned, "trained": trained})
        add_checksums(run.folder, [MICROBATCH_NOTE])


def set_aside(folder: Path) -> Path:
    """Rename a run folder out of the way and keep its contents; returns the new path."""
    number = 1
    while exists(aside := folder.with_name(f"{folder.name}.old{number}")):
        number += 1
    try:
        folder.rename(aside)
    except OSError as error:
        raise write_error(aside, error) from error
    return aside
