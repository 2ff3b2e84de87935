"""A run folder as a tracker sees it: identity, config and rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from datetime import datetime
from pathlib import Path

from storylab.config import TrainConfig, flat, recipe_digest
from storylab.files import exists
from storylab.record.folder import METRICS, RunFolder
from storylab.record.schema import DataInfo, Environment
from storylab.tracking.protocol import Place, TrackedRun

# Folders say where something is on this machine, and may hold the name of a person.
NOT_SENT = ("out_dir", "data_dir")


def tracked_run(folder: Path, place: Place) -> TrackedRun:
    """The run in ``folder``, with the rows that it has now.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    run = RunFolder(folder)
    config, data, environment = run.read_config(), run.read_data(), run.read_environment()
    metrics = folder.absolute() / METRICS
    return TrackedRun(
        id=run_id(config, data, environment),
        place=place,
        folder=str(folder.absolute()),
        started=seconds_since_1970(environment.started),
        config=flat(config, NOT_SENT) | _origin(data, environment, place),
        history=str(metrics),
        history_bytes=metrics.stat().st_size if exists(metrics) else 0,
    )


def run_id(config: TrainConfig, data: DataInfo, environment: Environment) -> str:
    """32 hexadecimal digits of a run: of its recipe, seeds, data, first weights and start.

    Moving the folder keeps them, and so does resuming: fields that a resume may change do not count. A
    run that is trained again has others.
    """
    fixed = dataclasses.replace(config, max_iters=0, compile=False)
    facts = [
        *(recipe_digest(fixed, data.fingerprint), config.seed, config.resolved_data_seed),
        *(config.batch_size, environment.started),
        *(environment.initial_weights_sha256, environment.first_batch_sha256),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def seconds_since_1970(text: str) -> float:
    """A time of the record as a number; 0 where it cannot be read."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (ValueError, OverflowError):
        return 0.0


def _origin(data: DataInfo, environment: Environment, place: Place) -> dict[str, str | None]:
    """Data, code and machine, and the arm of an experiment."""
    origin = {
        "data_fingerprint": data.fingerprint,
        "code_sha256": environment.code_sha256,
        "git_commit": environment.git_commit,
        "storylab": environment.storylab,
        "torch": environment.packages.torch,
        "cpu": environment.cpu,
        "gpu": environment.gpu,
    }
    in_experiment = {"experiment": place.project, "arm": place.group}
    return origin | {name: value for name, value in in_experiment.items() if value}
