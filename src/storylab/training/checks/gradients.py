"""Every parameter gets a gradient that is finite and not zero.

Fused matrices are looked at projection by projection: a key that is left out of the graph would not show
in the gradient of queries, keys and values together.
"""

from __future__ import annotations

import torch

from storylab.training.check import Check, Finding, Part, Subject, model_parts

# Factor on float16 losses, whose gradients would underflow without.
FLOAT16_SCALE = 1024.0
SHOWN = 3


def run(subject: Subject) -> Finding:
    """Take the gradient of the first windows, in the dtype of the run and without quantization."""
    setup, windows = subject.setup, subject.windows
    scale = FLOAT16_SCALE if setup.precision.dtype == torch.float16 else 1.0
    with subject.uncompiled():
        with subject.autocast():
            loss = setup.state.model(windows[:, :-1], windows[:, 1:])
        (loss * scale).backward()
    idle = _without_gradient(subject)
    parts = list(model_parts(setup.state.model, setup.config.model))
    faults = [f"{part.name} {fault}" for part in parts if (fault := _fault(part, idle))]
    text = f"finite and not zero in {len(parts)} parts of the parameters"
    if not faults:
        return Finding(text)
    more = f" (and {len(faults) - SHOWN} more)" if len(faults) > SHOWN else ""
    fault = (
        f"{'; '.join(faults[:SHOWN])}{more}: the model does not use or does not train it; repair the code "
        "that changed, or run without this check by --skip_checks"
    )
    return Finding("", fault)


def _fault(part: Part, idle: set[str]) -> str | None:
    """The fault of a part's gradient in words, or None."""
    if part.parameter.grad is None:
        return "has no gradient" + ("" if part.parameter.requires_grad else " (it is frozen)")
    gradient = part.of(part.parameter.grad)
    if not gradient.isfinite().all():
        return "has a gradient that is not finite"
    if not gradient.any() and part.name not in idle:
        return "has a gradient of zero"
    return None


def _without_gradient(subject: Subject) -> set[str]:
    """Names of the parts that get no gradient by design: queries and keys of a layer in which every query
    reads a single position, whose weight is 1 whatever they are."""
    setup = subject.setup
    size, model = setup.config.block_size, setup.config.model
    layers = [n for n, p in enumerate(model.layer_patterns) if p.most_read(size) == 1]
    starts = [f"blocks.{layer}.attention.qkv." for layer in layers]
    found: set[str] = set()
    for start in starts:
        parts = [p for p in model_parts(setup.state.model, model) if p.name.startswith(start)]
        found |= {part.name for part in parts[:2]}
    return found


CHECK = Check("gradients", 40, run)
