"""The optimizers move every parameter.

Each parameter must be in exactly one group of one optimizer. Then the run's own optimizers take a step on
random gradients, without weight decay, and every part of every parameter must have changed. Weights, groups
and state are put back afterwards.

Parameters take this step in batches that hold a quarter of the model, so that memory is bounded: besides
the weights there are a copy, the gradients and new state of one batch, where training has the gradients
and the state of all. A batch holds at least one parameter, and many matrices of one shape, which
optimizers may treat together.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from storylab.optim import OPTIMIZERS
from storylab.optim.build import set_learning_rate
from storylab.training.check import Check, Finding, Part, Subject, model_parts

BATCHES = 4
# At a smaller rate than this a step may be less than a weight's last digit.
LEAST_RATE = 1e-6
SHOWN = 3


def applies(subject: Subject) -> bool:
    """Whether the config lets all parameters move."""
    config = subject.setup.config
    own_rate = OPTIMIZERS[config.optimizer].rate_field
    return config.learning_rate > 0 and (not own_rate or getattr(config, own_rate) > 0)


def run(subject: Subject) -> Finding:
    """Take a step on random gradients, a quarter of the model at a time."""
    setup = subject.setup
    model, optimizers = setup.state.model, setup.state.optimizers
    groups = Counter(p for o in optimizers for group in o.param_groups for p in group["params"])
    named = list(model.named_parameters())
    faults = [
        f"{name} is in {groups[p]} groups of the optimizers" for name, p in named if groups[p] != 1
    ]
    if not faults:
        parts = list(model_parts(model, setup.config.model))
        rate = max(setup.config.learning_rate, LEAST_RATE)
        with _groups_restored(optimizers):
            set_learning_rate(optimizers, rate)
            for batch in _batches([p for _, p in named]):
                faults += [
                    f"{name} is not moved by a step" for name in _unmoved(optimizers, batch, parts)
                ]
    text = f"a step moves all {len(named)} parameters"
    if not faults:
        return Finding(text)
    more = f" (and {len(faults) - SHOWN} more)" if len(faults) > SHOWN else ""
    fault = (
        f"{'; '.join(faults[:SHOWN])}{more}: it would stay as it is or be updated twice; repair the "
        "optimizer or its groups"
    )
    return Finding("", fault)


def _batches(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in order, in batches of a quarter of all elements, or of one parameter if that is more."""
    most = sum(p.numel() for p in parameters) / BATCHES
    batch: list[nn.Parameter] = []
    for parameter in parameters:
        if batch and sum(p.numel() for p in [*batch, parameter]) > most:
            yield batch
            batch = []
        batch.append(parameter)
    yield batch


def _unmoved(
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Sequence[nn.Parameter],
    parts: Sequence[Part],
) -> list[str]:
    """Names of the parts of ``batch`` that a step leaves as they were; weights and state are put back."""
    before = {parameter: parameter.detach().clone() for parameter in batch}
    draws = torch.Generator(batch[0].device).manual_seed(0)
    for parameter in batch:
        parameter.grad = torch.empty_like(parameter).uniform_(-1, 1, generator=draws)
    try:
        for optimizer in optimizers:
            optimizer.step()
        return [p.name for p in parts if p.parameter in before and not _has_moved(p, before)]
    finally:
        with torch.no_grad():
            for parameter, values in before.items():
                parameter.copy_(values)
                parameter.grad = None
                for optimizer in optimizers:
                    optimizer.state.pop(parameter, None)


def _has_moved(part: Part, before: dict[nn.Parameter, Tensor]) -> bool:
    return not torch.equal(part.of(part.parameter), part.of(before[part.parameter]))


@contextmanager
def _groups_restored(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Context without weight decay, after which the groups have their settings of before."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    saved = [_settings(group) for group in groups]
    try:
        for group in groups:
            group["weight_decay"] = 0.0
        yield
    finally:
        for group, settings in zip(groups, saved, strict=True):
            for name in group.keys() - settings.keys() - {"params"}:
                del group[name]
            group.update(settings)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}


CHECK = Check("optimizer", 70, run, applies=applies)
