"""A later token changes nothing before it.

The model reads a window twice, and again with all tokens from a place on replaced. States before that place
must be the same, up to twice the difference of the first two passes, which is 0 unless kernels add up in
varying order. Every pass has the same shape, so the same numbers come from the same operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from storylab.training.check import Check, Finding, Subject


def applies(subject: Subject) -> bool:
    """Whether there is a later token, and another one to replace it by."""
    return (
        subject.setup.config.block_size > 1
        and subject.setup.state.model.embedding.num_embeddings > 1
    )


@torch.no_grad()
def run(subject: Subject) -> Finding:
    """Replace the later tokens from two places on."""
    tokens = subject.windows[:1, :-1]
    length = tokens.shape[1]
    base, limit = repeated_states(subject, tokens)
    places = sorted({length // 2, length // 3 + 1} & set(range(1, length)))
    for place in places:
        changed = moved(base, states(subject, replaced(tokens, place, length)), limit)
        if early := changed[:place].nonzero().flatten().tolist():
            fault = (
                f"replacing the tokens from position {place} on changes the state of position {early[0]}: "
                "the model sees tokens that it has to predict; repair its mask"
            )
            return Finding("", fault)
        if not changed[place]:
            fault = (
                f"replacing the token of position {place} leaves its own state: repair the model"
            )
            return Finding("", fault)
    shown = " and ".join(map(str, places))
    return Finding(f"replacing the tokens from position {shown} on changes no state before")


def states(subject: Subject, tokens: Tensor) -> Tensor:
    """Final states ``[T, C]`` in float32 of ``tokens [1, T]``; a row of logits follows from a state."""
    with subject.uncompiled(), subject.autocast():
        return subject.setup.state.model.hidden_states(tokens)[0].float()


def repeated_states(subject: Subject, tokens: Tensor) -> tuple[Tensor, float]:
    """:func:`states`, and twice their largest difference from those of a second pass."""
    base = states(subject, tokens)
    return base, 2 * float((base - states(subject, tokens)).abs().max())


def moved(base: Tensor, other: Tensor, limit: float) -> Tensor:
    """Positions at which two results ``[T, C]`` differ by more than ``limit``: bool ``[T]``."""
    return ~((base - other).abs().amax(dim=-1) <= limit)


def replaced(tokens: Tensor, first: int, end: int) -> Tensor:
    """``tokens [1, T]`` with each one from position ``first`` to ``end - 1`` replaced by another."""
    other = tokens.clone()
    # Neighbors in the vocabulary: the ids stay inside, and every one changes.
    other[:, first:end] += torch.where(other[:, first:end] > 0, -1, 1)
    return other


CHECK = Check("causality", 50, run, applies=applies, on_resume=True)
