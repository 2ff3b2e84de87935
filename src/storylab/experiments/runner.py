"""Running an experiment: a plan, then every arm with every seed, each in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from storylab import config as configs
from storylab.config import PRESENTATION_FIELDS, TrainConfig
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.experiments.factors import (
    LEARNING_RATE_FIELDS,
    LENGTH_FIELDS,
    SEED_FIELDS,
    SPLIT_FIELDS,
    under,
)
from storylab.experiments.spec import Cell, Experiment
from storylab.experiments.worker import (
    DIVERGED,
    DONE,
    FAILED,
    INTERRUPTED,
    KILLED,
    OUT_OF_MEMORY,
)
from storylab.files import (
    HeldError,
    exclusive,
    exists,
    held,
    make_folder,
    read_record,
    reading,
    write_error,
    write_json,
)
from storylab.record.folder import CONFIG, FAILURE, RunFolder
from storylab.record.index import RunCache
from storylab.record.provenance import code_sha256, representative
from storylab.record.run import ENDED, FINISHED
from storylab.record.schema import ExperimentRecord
from storylab.training.loop import Reporter, TrainingInterrupted, resolve_device
from storylab.training.measure import Measured
from storylab.training.signals import stop_signals

EXPERIMENTS = "experiments"
POLL_SECONDS = 2.0
LOCKS = ".locks"
# Fields that no calibration depends on. One forgotten here costs a calibration too many; one forgotten in a
# list of those that count would lend a run the calibration of another.
UNTIMED_FIELDS = {
    *("preset", "method", "matrix_lr", "weight_decay", "beta1", "beta2", "grad_clip"),
    *("short_share", "eval_interval", "eval_iters"),
    *(LEARNING_RATE_FIELDS | LENGTH_FIELDS | SEED_FIELDS),
    *PRESENTATION_FIELDS,
}
# Beside a run that had to be cut finer than it was asked for: why.
SPLIT_NOTE = "split.json"


class Watcher(Reporter, Protocol):
    """Where an experiment tells how it goes."""

    def overall(self, name: str, done: float, total: float) -> None:
        """How much of the whole experiment is done."""
        ...


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment: an arm under a condition with a seed, and where it lies."""

    cell: Cell
    seed: int
    folder: Path
    cache: RunCache = field(default_factory=RunCache, compare=False, repr=False)
    """Runs that have been read; shared by the runs of a plan."""

    @property
    def config(self) -> TrainConfig:
        """The config to train with."""
        return dataclasses.replace(
            self.cell.config, seed=self.seed, data_seed=self.seed, out_dir=self.folder
        )

    @property
    def label(self) -> str:
        """Arm, condition and seed, for a person."""
        return f"{under(self.cell.arm, self.cell.condition)}, seed {self.seed}"

    @property
    def state(self) -> str:
        """``finished``, ``diverged``, ``failed``, ``unfinished``, ``new``, or ``damaged``."""
        return self.state_and_reason()[0]

    def state_and_reason(self) -> tuple[str, str]:
        """The state, and why it failed, diverged or is damaged.

        A run that has ended is not trained again, so all of its record must be there.
        """
        return self.cache.state(self.folder)

    @property
    def other_code(self) -> bool:
        """Whether the run there is by another version of the code that decides its numbers."""
        try:
            stage = self.cache.load(self.folder).environment
        except UserError:
            return False
        return representative(stage.code_sha256) != representative(code_sha256())


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take; ``measured`` if a like run has been trained already.

    ``other_cores`` is how many cores other programs used during its calibration.
    """

    seconds: float
    memory_bytes: float
    measured: bool
    other_cores: float = 0.0


def recipe_digest(config: TrainConfig, fingerprint: str) -> str:
    """What a run computes, seed apart, as ten hexadecimal digits: resolved config and data.

    How the batch is cut into micro-batches is left out, so that a run that had to be cut finer
    to fit into memory still is the run that was asked for.
    """
    values = configs.to_dict(config)
    for name in (*PRESENTATION_FIELDS, *SEED_FIELDS, *SPLIT_FIELDS):
        del values[name]
    for fields, added in (
        (values, configs.ADDED_FIELDS),
        (values["model"], configs.ADDED_MODEL_FIELDS),
    ):
        for name, before in added.items():
            if fields.get(name) == before:
                del fields[name]
    values["sequences"] = config.batch_size * config.gradient_accumulation_steps
    text = json.dumps([values, fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def require_runnable(experiment: Experiment) -> None:
    """Raise a UserError if the experiment waits for something that storylab does not have yet."""
    if experiment.waits_for:
        raise UserError(f"{experiment.name} cannot run yet: it waits for {experiment.waits_for}")


def resolved_cells(
    experiment: Experiment, dataset: Dataset, only: Collection[str] = ()
) -> list[tuple[Cell, str]]:
    """Every cell with device and data filled in, and the name that its runs' folders begin with.

    Raises:
        UserError: the experiment cannot run yet, or this machine lacks the device or precision of
            one of its arms, or of those in ``only``.
    """
    require_runnable(experiment)
    cells = []
    for cell in experiment.cells:
        dataset.require_window(cell.config.block_size)
        config = dataclasses.replace(cell.config, data_dir=dataset.folder)
        try:
            config, _ = resolve_device(config)
        except UserError as error:
            if not only or cell.arm in only:
                raise UserError(f"arm '{cell.arm}': {error}; --only runs the other arms") from error
        name = f"{config.preset}-{recipe_digest(config, dataset.fingerprint)}"
        # A run has to know whether compiling was asked for by name: if it goes wrong, it stops only then.
        config = dataclasses.replace(config, compile=cell.config.compile)
        cells.append((dataclasses.replace(cell, config=config), name))
    return cells


def plan(
    experiment: Experiment,
    dataset: Dataset,
    runs: Path,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] = (),
) -> list[PlannedRun]:
    """The runs of an experiment in the order in which they are trained: seed by seed, so that every
    arm has a result early.

    Raises:
        UserError: the experiment cannot run yet, ``only`` names no arm, or this machine has not
            got the device or precision.
    """
    if unknown := set(only) - set(experiment.arms):
        raise UserError(
            f"there is no arm {', '.join(sorted(unknown))}: use one of {', '.join(experiment.arms)}"
        )
    cells = resolved_cells(experiment, dataset, only)
    cache = RunCache()
    return [
        PlannedRun(cell, seed, runs / f"{name}-s{seed}", cache)
        for seed in seeds or experiment.seeds
        for cell, name in cells
        if not only or cell.arm in only
    ]


def write_record(
    experiment: Experiment, dataset: Dataset, planned: Sequence[PlannedRun], runs: Path
) -> Path:
    """Write which runs make up the experiment, for the comparison and the report to read.

    Runs that this call leaves out, but an earlier one had, stay listed while their arm is what it was.
    """
    path = runs / EXPERIMENTS / f"{experiment.label}.json"
    make_folder(path.parent)
    values = dataclasses.asdict(experiment)
    del values["data"], values["cells"]
    before = _recorded_runs(path)
    values["cells"] = []
    arms = {run.cell.arm for run in planned}
    for cell, name in resolved_cells(experiment, dataset, arms):
        key = (cell.condition, cell.arm)
        seeds = {run.seed for run in planned if (run.cell.condition, run.cell.arm) == key}
        seeds |= {
            seed for seed, folder in before.get(key, {}).items() if folder == f"{name}-s{seed}"
        }
        values["cells"].append(
            {
                "condition": cell.condition,
                "arm": cell.arm,
                "config": configs.to_dict(cell.config),
                "runs": {str(seed): f"{name}-s{seed}" for seed in sorted(seeds)},
            }
        )
    write_json(path, values)
    return path


def _recorded_runs(path: Path) -> dict[tuple[str, str], dict[int, str]]:
    """Folders by seed of every cell of an earlier record; nothing where there is none to be read."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    with contextlib.suppress(UserError):
        for cell in read_record(path, ExperimentRecord).cells:
            runs = {int(s): folder for s, folder in cell.runs.items() if s.isdecimal()}
            found[cell.condition, cell.arm] = runs
    return found


def estimates(planned: Sequence[PlannedRun]) -> Iterator[tuple[PlannedRun, Estimate | None]]:
    """What each run will take: from a finished run of the same cell, or a calibration of seconds that like
    runs share; None where the calibration failed."""
    calibrated: dict[str, dict[str, float] | None] = {}
    finished: dict[Cell, Estimate | None] = {}
    for run in planned:
        if run.cell not in finished:
            finished[run.cell] = _finished_estimate([r for r in planned if r.cell == run.cell])
        estimate = finished[run.cell]
        if estimate is None:
            key = _timed(run.config)
            if key not in calibrated:
                calibrated[key] = _calibration(run.config)
            measured = calibrated[key]
            estimate = _expected(run.config, measured) if measured else None
        yield run, estimate


def _timed(config: TrainConfig) -> str:
    """What a calibration depends on: runs that are alike in it share one."""
    values = configs.to_dict(config)
    for name in UNTIMED_FIELDS:
        del values[name]
    values["gradient_accumulation_steps"] = config.gradient_accumulation_steps > 1
    values["average_share"] = config.average_share > 0
    return json.dumps(values)


def _finished_estimate(runs: Sequence[PlannedRun]) -> Estimate | None:
    for run in runs:
        if run.state == FINISHED:
            summary = run.cache.load(run.folder).results
            return Estimate(summary.seconds, summary.peak_memory_bytes, measured=True)
    return None


def _calibration(config: TrainConfig) -> dict[str, float] | None:
    """What a worker measures; None if it fails: training will find out why, and keep it as a result."""
    measured, _ = ask("measure", config)
    return measured


def ask(action: str, config: TrainConfig, **options: Any) -> tuple[dict[str, Any] | None, str]:
    """What a worker measures, in a process of its own; None and the reason if it fails."""
    answers: list[dict[str, Any]] = []
    _, reason = _Child(action, config, **options).serve(answers.append)
    return next((answer for answer in answers if answer["event"] == "measured"), None), reason


def _expected(config: TrainConfig, measured: dict[str, float]) -> Estimate:
    evaluations = -(-config.max_iters // config.eval_interval)
    batches = 2 * config.eval_iters * evaluations + measured["evaluation_batches"]
    memory = measured["peak_memory_bytes"]
    steps = Measured(measured["micro_batch_seconds"], measured["update_seconds"], memory)
    seconds = steps.seconds(config) + batches * measured["evaluation_batch_seconds"]
    return Estimate(seconds, memory, measured=False, other_cores=measured["other_cores"])


def run_experiment(
    planned: Sequence[PlannedRun], watcher: Watcher, fresh: bool = False
) -> list[str]:
    """Train what is not trained yet; returns the state of every run.

    An arm that diverges, fails or runs out of memory is kept as a result and the others go on.

    Raises:
        TrainingInterrupted: a signal stopped it; the same command goes on from there.
    """
    total = float(sum(_tokens(run) for run in planned))
    done = 0.0
    states: dict[int, str] = {}
    seen: set[Path] = set()
    left = list(range(len(planned)))
    while left:
        # What another process trains is left for later: two on one experiment share the work.
        index = next((i for i in left if not _taken(planned[i])), left[0])
        left.remove(index)
        run = planned[index]
        name = f"[{index + 1}/{len(planned)}] {run.label}"
        watcher.overall(name, done, total)
        anew = fresh and run.folder not in seen
        with _alone(run, name, watcher):
            try:
                states[index] = _settle(run, name, watcher, anew, done, total)
            except UserError as error:  # of this run's folder: the others may go on
                watcher.line(f"{name}: failed: {error}")
                states[index] = "failed"
        seen.add(run.folder)
        done += _tokens(run)
    watcher.overall("done", total, total)
    return [states[index] for index in range(len(planned))]


def _settle(
    run: PlannedRun, name: str, watcher: Watcher, anew: bool, done: float, total: float
) -> str:
    """Train a run unless it has ended; returns its state."""
    state, reason = run.state_and_reason()
    if state == "damaged":
        _require_open(run.folder)
    if exists(run.folder) and (state == "damaged" or anew):
        why = f"damaged ({reason})" if state == "damaged" else "to be trained anew"
        watcher.line(f"{name}: {why}, set aside as {set_aside(run.folder)}")
        state = "new"
    if state in ENDED:
        note = ", by another version of the code" if run.other_code else ""
        where = f"trained before{note}: {run.folder}"
        watcher.line(f"{name}: {outcome_line(run)} ({where})")
        return state
    if state == "unfinished" and run.other_code:
        watcher.line(f"{name}: begun by another version of the code; going on with it")
    _train(run, name, watcher, done, total)
    watcher.line(f"{name}: {outcome_line(run)}")
    return run.state


def _lock(run: PlannedRun) -> Path:
    return run.folder.parent / LOCKS / run.folder.name


def _taken(run: PlannedRun) -> bool:
    """Whether another process is at a run."""
    return any(_taken_folder(folder) for folder in (_lock(run), run.folder))


def _taken_folder(folder: Path) -> bool:
    try:
        return exists(folder) and held(folder)
    except UserError:
        return False  # what cannot be opened is told of when its turn comes


@contextlib.contextmanager
def _alone(run: PlannedRun, name: str, watcher: Watcher) -> Iterator[None]:
    """Hold the run's name, so that experiments that share it do not train it twice at once."""
    lock = _lock(run)
    make_folder(lock)
    if _taken(run):
        watcher.line(f"{name}: another process is training it; waiting for that")
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(exclusive(lock))
            except HeldError:
                time.sleep(POLL_SECONDS)
                continue
            while _taken_folder(run.folder):
                time.sleep(POLL_SECONDS)
            yield
            return


def _tokens(run: PlannedRun) -> int:
    return (run.config.max_iters + 1) * run.config.tokens_per_iteration


def _train(run: PlannedRun, name: str, watcher: Watcher, done: float, total: float) -> None:
    """Train one run to its end; a micro-batch that does not fit into memory is halved."""
    config = run.config
    with reading(run.folder):
        (run.folder / FAILURE).unlink(missing_ok=True)

    def tell(event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            watcher.progress(event["name"], event["done"], event["total"])
            if event["name"] == "training":
                share = event["done"] / event["total"]
                watcher.overall(name, done + share * _tokens(run), total)

    killed = False
    while True:
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        outcome, reason = _Child("train", config).serve(tell)
        if outcome == INTERRUPTED:
            raise TrainingInterrupted(reason, signal.SIGTERM)
        if outcome in (DONE, DIVERGED):
            if config.batch_size != run.config.batch_size:
                note = {"asked": run.config.batch_size, "trained": config.batch_size}
                write_json(run.folder / SPLIT_NOTE, note)
            return
        if outcome == KILLED and not killed and exists(RunFolder(run.folder).checkpoint("last")):
            killed = True  # whoever did it may have meant the process, not the run
            watcher.line(f"{name}: {reason}; going on from its checkpoint")
            continue
        if outcome in (OUT_OF_MEMORY, KILLED) and config.batch_size % 2 == 0:
            if exists(run.folder / CONFIG):
                config = RunFolder(run.folder).read_config()
                set_aside(run.folder)
            config = dataclasses.replace(
                config,
                batch_size=config.batch_size // 2,
                gradient_accumulation_steps=config.gradient_accumulation_steps * 2,
                out_dir=run.folder,
            )
            watcher.line(
                f"{name}: {reason or outcome}; again with micro-batches of {config.batch_size} "
                f"sequences, {config.gradient_accumulation_steps} of them an iteration (the same tokens)"
            )
            continue
        make_folder(run.folder)
        failure = {"outcome": outcome, "reason": reason, "started": started}
        write_json(run.folder / FAILURE, failure)
        return


def _require_open(folder: Path) -> None:
    """Raise a UserError if a run is no worse than closed to this user: it may be whole."""
    with reading(folder):
        inside = folder.iterdir() if folder.is_dir() else ()
        for path in (folder, *inside):
            if path.exists() and not os.access(path, os.R_OK):
                raise UserError(f"cannot read {path}: Permission denied")


def set_aside(folder: Path) -> Path:
    """Rename a run folder out of the way, keeping what is in it."""
    number = 1
    while exists(aside := folder.with_name(f"{folder.name}.old{number}")):
        number += 1
    try:
        folder.rename(aside)
    except OSError as error:
        raise write_error(aside, error) from error
    return aside


def outcome_line(run: PlannedRun) -> str:
    """How a run ended, in a few words."""
    state, reason = run.state_and_reason()
    if state != FINISHED:
        return f"{state} ({reason})" if reason else state
    found = run.cache.load(run.folder)
    return (
        f"val loss {found.loss:.4f}, "
        f"{found.results.tokens_per_second:,.0f} tok/s, "
        f"{found.results.peak_memory_bytes / 1e9:.2f} GB, {found.results.seconds:,.0f} s"
    )


def _event(line: str) -> dict[str, Any]:
    """What a worker tells in a line; of kind ``""`` where a library has printed something there."""
    with contextlib.suppress(ValueError):
        event = json.loads(line)
        if isinstance(event, dict) and "event" in event:
            return event
    return {"event": ""}


class _Child:
    """A worker process that serves one request, and stops when this process is told to."""

    def __init__(self, action: str, config: TrainConfig, **options: Any) -> None:
        request = {"action": action, "config": configs.to_dict(config), "options": options}
        self.request = json.dumps(request)
        self.stopped_by: int | None = None

    def serve(self, tell: Any) -> tuple[str, str]:
        """Run it to its end, passing every event on; returns the outcome and the reason.

        Raises:
            TrainingInterrupted: this process was told to stop, and so was the child.
        """
        with tempfile.TemporaryFile() as errors:
            # A session of its own: Ctrl-C reaches this process alone, which passes it on.
            child = subprocess.Popen(
                [sys.executable, "-m", "storylab.experiments.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                text=True,
            )
            assert child.stdin is not None and child.stdout is not None
            end: dict[str, Any] | None = None

            def stop(number: int) -> None:
                self.stopped_by = number
                child.terminate()  # it saves its run and ends

            with child, stop_signals(stop):
                try:
                    with contextlib.suppress(BrokenPipeError):  # it ended before it could listen
                        child.stdin.write(self.request)
                        child.stdin.close()
                    for line in child.stdout:
                        event = _event(line)
                        if event["event"] == "end":
                            end = event
                        else:
                            tell(event)
                    child.wait()
                except BaseException:  # a second Ctrl-C, say: leave no worker behind
                    child.terminate()
                    raise
            if self.stopped_by is not None:
                raise TrainingInterrupted("the experiment was stopped", self.stopped_by)
            if end is not None:
                return end["outcome"], end["reason"]
            if child.returncode == -signal.SIGKILL:
                return KILLED, "killed (SIGKILL), as the system does when memory is short"
            errors.seek(0)
            last = errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            return FAILED, f"the process ended with {child.returncode}: {' '.join(last)}"
