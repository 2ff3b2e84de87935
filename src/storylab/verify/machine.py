"""Whether this machine and code compute the bits of a run, or the same up to rounding."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from storylab.errors import UserError
from storylab.precision.edit import find_recipe
from storylab.record.provenance import current_stage, representative
from storylab.record.run import Run
from storylab.record.schema import Stage
from storylab.training.precision import choose_device

# By how many nats a token the loss of the same weights may differ on another machine, whose kernels
# round and add up in another order.
ROUNDING = {"float32": 1e-4}
ROUNDING_OF_16_BITS = 1e-2

_stage = cache(current_stage)


def device_for(run: Run, wanted: str | None) -> torch.device:
    """The device to evaluate on: the one asked for, else the run's own, else the best one here.

    Raises:
        UserError: there is no such device.
    """
    if wanted is not None:
        return choose_device(wanted)
    try:
        return choose_device(run.environment.device)
    except UserError:
        return choose_device("auto")


@contextmanager
def threads_of(run: Run) -> Iterator[None]:
    """As many threads as the run had at its end, on which its bits depend, if there are cores for them."""
    before, wanted = torch.get_num_threads(), run.stages[-1].threads
    if 0 < wanted <= (os.cpu_count() or 1):
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def other_draws(run: Run) -> str:
    """Why this process may draw other initial weights from a seed than the run did; empty if it cannot."""
    now, then = _stage(), run.environment
    if now.packages.torch != then.packages.torch:
        return f"the run had torch {then.packages.torch}, this is {now.packages.torch}"
    if representative(now.code_sha256) != representative(then.code_sha256):
        return "the run had other code"
    return ""


def other_bits(run: Run, device: torch.device) -> str:
    """Why an evaluation here may differ from the run's in rounding; empty if every bit must be the same."""
    return ", ".join(_reasons(run, _stage(), device))


def _reasons(run: Run, now: Stage, device: torch.device) -> Iterator[str]:
    then = run.stages[-1]
    threads = torch.get_num_threads()
    if str(device) != run.environment.device or device.type != "cpu":
        yield f"computed on {device}, the run on {run.environment.gpu or run.environment.device}"
    for name, a, b in (
        ("another processor", now.processor, then.processor),
        ("another instruction set", now.cpu, then.cpu),
        ("another number of threads", threads, then.threads),
        ("other packages", now.packages, then.packages),
        ("other code", representative(now.code_sha256), representative(then.code_sha256)),
    ):
        if a != b:
            yield name
    if find_recipe(run.config.dtype, run.config.recipe) is not None:
        yield "layers of low precision, evaluated without them"


def allowed_rounding(run: Run) -> float:
    """By how many nats a token a loss may differ where bits may."""
    return ROUNDING.get(run.config.dtype, ROUNDING_OF_16_BITS)
