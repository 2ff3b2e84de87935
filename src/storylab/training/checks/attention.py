"""The attention patterns are in force: every query reads the positions that its pattern lists, and no
other.

Layer by layer, one position of a random residual stream is negated. The output of a query must change if
the pattern lets it read that position, and must stay the same, as in the check of causality, if not. Then
the whole model reads tokens of which all are replaced that its layers cannot reach together, and after
that all that they can: the last state must stay the same, and must change.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from storylab.model.attention_cuda import cuda_masks
from storylab.model.layers import rope_cos_sin
from storylab.model.transformer import Block
from storylab.training.check import Check, Finding, Subject
from storylab.training.checks import causality


def applies(subject: Subject) -> bool:
    """Whether a layer leaves out positions of a window."""
    config = subject.setup.config
    return any(not pattern.covers(config.block_size) for pattern in config.model.layer_patterns)


@torch.no_grad()
def run(subject: Subject) -> Finding:
    """Compare every layer with its pattern, and the whole model with its receptive field."""
    config = subject.setup.config
    size = config.block_size
    for layer in range(config.model.n_layer):
        if fault := _layer_fault(subject, layer):
            return Finding("", f"{fault}; repair the kernel of this pattern")
    field = config.model.receptive_field
    text = f"{config.model.n_layer} layers read the positions of their patterns"
    if field is None or field >= size:
        return Finding(text)
    tokens = subject.windows[:1, :-1]
    base, limit = causality.repeated_states(subject, tokens)
    for first, end, read in ((0, size - field, False), (size - field, size - 1, field > 1)):
        other = causality.states(subject, causality.replaced(tokens, first, end))
        if bool(causality.moved(base, other, limit)[-1]) != read:
            verb = "does not depend" if read else "depends"
            fault = (
                f"the state of position {size - 1} {verb} on positions {first} to {end - 1}, where all "
                f"layers together reach {field} positions; repair the kernel of this pattern"
            )
            return Finding("", fault)
    return Finding(f"{text}, {field} positions together")


def _layer_fault(subject: Subject, layer: int) -> str | None:
    """The first query of a layer that reads a position wrongly, in words; None if there is none."""
    size, device = subject.setup.config.block_size, subject.setup.precision.device
    pattern = subject.setup.config.model.layer_patterns[layer]
    stream, residual = _inputs(subject, layer)
    base = _mixed(subject, layer, stream, residual)
    limit = 2 * float((base - _mixed(subject, layer, stream, residual)).abs().max())
    for key in sorted({0, size // 3}):
        other = stream.clone()
        other[:, key] *= -1
        changed = causality.moved(base, _mixed(subject, layer, other, residual), limit)
        positions = torch.arange(size, device=device)
        wrong = (changed != pattern.allows(positions, key)).nonzero().flatten().tolist()
        if wrong:
            reads = "reads" if changed[wrong[0]] else "does not read"
            return (
                f"layer {layer + 1} ({pattern.label}): position {wrong[0]} {reads} position {key}"
            )
    return None


def _inputs(subject: Subject, layer: int) -> tuple[Tensor, Tensor | None]:
    """A random residual stream ``[1, T, C]``, and values ``[1, T, K * D]`` for a layer that adds some."""
    config, device = subject.setup.config, subject.setup.precision.device
    draws = torch.Generator().manual_seed(layer)
    shape, model = (1, config.block_size), config.model
    stream = torch.randn(*shape, model.n_embd, generator=draws).to(device)
    if not model.has_value_residual(layer):
        return stream, None
    values = torch.randn(*shape, model.n_kv_head * model.head_size, generator=draws)
    return stream, values.to(device)


def _mixed(subject: Subject, layer: int, stream: Tensor, residual: Tensor | None) -> Tensor:
    """Output ``[T, C]`` of the attention of ``layer``, float32."""
    setup = subject.setup
    model, config = setup.state.model, setup.config.model
    block = cast(Block, model.blocks[layer])
    size, device = setup.config.block_size, setup.precision.device
    rotary = rope_cos_sin(config, torch.arange(size, device=device))
    with subject.uncompiled(), subject.autocast():
        (mask,) = cuda_masks([config.layer_patterns[layer]], stream, config.head_size)
        output, _ = block.attention(stream, block.attention_norm, rotary, None, residual, mask)
    return output[0].float()


CHECK = Check("attention patterns", 60, run, applies=applies, on_resume=True)
