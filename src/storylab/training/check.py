"""A check before the first step of a run. Each module in ``checks/`` holds one.

A check looks at a run that is ready to begin and changes nothing: weights, optimizer state, random numbers
and the order of the data are the same afterwards. A fault stops the run before time is spent on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from storylab.config import ModelConfig
from storylab.record.folder import RunFolder
from storylab.training.observers import Observers
from storylab.training.precision import ComputePolicy
from storylab.training.setup import TrainingSetup

# Passes through the model read about this many tokens, and at least one window.
TOKENS = 256


@dataclass(frozen=True)
class Finding:
    """The outcome of a check.

    Attributes:
        text: the finding in one line, for the record of the run.
        fault: the fault and its remedy in one line; empty if the check passed.
    """

    text: str
    fault: str = ""


@dataclass
class Subject:
    """A run that is ready to begin or to go on, as checks see it.

    Attributes:
        setup: the run.
        observers: see the progress and lines for the user.
        resumed: folder of the run that goes on; None for a new one.
        compile_asked: whether the user asked for compiling by name.
    """

    setup: TrainingSetup
    observers: Observers
    resumed: RunFolder | None = None
    compile_asked: bool = False

    @cached_property
    def micro_batch(self) -> Tensor:
        """The next micro-batch, ``[S, T + 1]`` int64 on the run's device."""
        setup = self.setup
        batch = setup.batches(setup.progress.next_iteration)
        return batch[: setup.config.batch_size].to(setup.precision.device)

    @property
    def windows(self) -> Tensor:
        """The first windows of :attr:`micro_batch`, for a pass of a fraction of a second."""
        return self.micro_batch[: max(1, TOKENS // self.setup.config.block_size)]

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Context in which the model runs without compiled or quantized blocks, forward and backward.

        Other checks prove those. Here their scales, which a later token can change, would blur the rest.
        """
        compiled, quantization = self.setup.config.compile, self.setup.state.quantization
        stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with stance, quantization.disabled() if quantization else nullcontext():
            yield

    def autocast(self) -> AbstractContextManager[None]:
        """Context for a forward pass in the dtype of the run."""
        return ComputePolicy(self.setup.precision.device, self.setup.precision.dtype).autocast()


def _always(subject: Subject) -> bool:
    return True


@dataclass(frozen=True)
class Check:
    """A check before the first step.

    Attributes:
        name: in records and messages, a few words.
        position: place in the order of checks: those that take less time come first.
        run: does the work. May raise a UserError itself, or leave gradients behind.
        applies: whether the run has what the check is about.
        on_resume: whether a resumed run is checked again, as another machine may differ.
        fall_back: given a fault, another setup with which the run can go on; None stops the run.
    """

    name: str
    position: int
    run: Callable[[Subject], Finding]
    applies: Callable[[Subject], bool] = _always
    on_resume: bool = False
    fall_back: Callable[[Subject, str], TrainingSetup] | None = None


@dataclass(frozen=True)
class Part:
    """Rows of a parameter that are one projection, or a whole parameter.

    Attributes:
        name: of the parameter, with the rows if it fuses several projections.
        parameter: the whole parameter.
        rows: its rows that belong to the part; a scalar parameter has none to choose from.
    """

    name: str
    parameter: nn.Parameter
    rows: slice

    def of(self, values: Tensor) -> Tensor:
        """The part's share of ``values``, which have the shape of the parameter."""
        return values[self.rows] if values.dim() else values


def model_parts(model: nn.Module, config: ModelConfig) -> Iterator[Part]:
    """All parameters of ``model``, fused matrices projection by projection."""
    fused = {f"{m.name}.weight": m.parts for m in config.matrices() if len(m.parts) > 1}
    for name, parameter in model.named_parameters():
        parts = next((parts for end, parts in fused.items() if name.endswith(end)), None)
        if parts is None:
            yield Part(name, parameter, slice(None))
            continue
        first = 0
        for rows in parts:
            yield Part(
                f"{name}, rows {first} to {first + rows - 1}",
                parameter,
                slice(first, first + rows),
            )
            first += rows
