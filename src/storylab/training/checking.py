"""Runs the checks before the first step of a run; each is a module in ``checks/``."""

from __future__ import annotations

import dataclasses
import pkgutil
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import numpy as np
import torch

from storylab.errors import UserError
from storylab.record.folder import RunFolder
from storylab.record.schema import CheckRecord, Checks
from storylab.training import checks
from storylab.training.check import Check, Subject
from storylab.training.cores import considerate
from storylab.training.observers import Observers
from storylab.training.setup import TrainingSetup


def _found() -> Iterator[Check]:
    for module in pkgutil.iter_modules(checks.__path__):
        yield import_module(f"{checks.__name__}.{module.name}").CHECK


CHECKS: tuple[Check, ...] = tuple(sorted(_found(), key=lambda check: (check.position, check.name)))


def run_checks(
    setup: TrainingSetup,
    observers: Observers,
    resumed: RunFolder | None = None,
    compile_asked: bool = False,
) -> TrainingSetup:
    """Check a run before its first step; returns the setup to go on with, which has the results.

    It is another setup only if the run goes on uncompiled. Otherwise no bit of it has changed.

    Args:
        setup: not started yet.
        observers: see the progress of compiling, and a line if the run goes on uncompiled.
        resumed: the run it was restored from, if any; only the checks of the machine are done again.
        compile_asked: whether the user asked for compiling by name.

    Raises:
        UserError: a check has failed; the message says how to go on.
    """
    if setup.config.skip_checks:
        setup.checks = Checks(skipped=True, seconds=0.0)
        return setup
    subject = Subject(setup, observers, resumed, compile_asked)
    started, results = time.perf_counter(), []
    device = setup.precision.device
    with considerate(device), _same_random_numbers(device):
        for check in CHECKS:
            if (resumed is None or check.on_resume) and check.applies(subject):
                subject, result = _checked(check, subject)
                results.append(result)
    seconds = time.perf_counter() - started
    subject.setup.checks = Checks(skipped=False, seconds=seconds, results=results)
    return subject.setup


def _checked(check: Check, subject: Subject) -> tuple[Subject, CheckRecord]:
    """The result of one check, and the subject to go on with.

    Raises:
        UserError: it has failed, and the run cannot go on without the thing that it checks.
    """
    started = time.perf_counter()
    try:
        finding = check.run(subject)
    finally:
        subject.setup.state.model.zero_grad(set_to_none=True)
    if finding.fault:
        if check.fall_back is None:
            raise UserError(f"check before the first step failed ({check.name}): {finding.fault}")
        subject = dataclasses.replace(subject, setup=check.fall_back(subject, finding.fault))
    return subject, CheckRecord(
        name=check.name,
        passed=not finding.fault,
        seconds=time.perf_counter() - started,
        finding=finding.fault or finding.text,
    )


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Context after which every global generator of random numbers is where it was."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
