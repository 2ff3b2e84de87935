"""Every parameter gets a gradient that is finite and not zero.

Fused matrices are looked at projection by projection: a key that is left out of the graph would not show
in the gradient of queries, keys and values together.
"""

from __future__ import annotations

import torch

from storylab.training.check import Check, Finding, Part, Subject, model_parts

# Factors on float16 losses: without one their gradients would underflow; the second is for models whose
# gradients the first takes out of range, as the loss scale of a run would fall too.
FLOAT16_SCALES = (1024.0, 1.0)
SHOWN = 3


def run(subject: Subject) -> Finding:
    """Take the gradient of the first windows, in the dtype of the run and without quantization."""
    setup = subject.setup
    parts, idle = list(model_parts(setup.state.model, setup.config.model)), _idle_parts(subject)
    faults: list[str] = []
    for scale in FLOAT16_SCALES if setup.precision.dtype == torch.float16 else (1.0,):
        _take_gradient(subject, scale)
        faults = [f"{part.name} {fault}" for part in parts if (fault := _fault(part, idle))]
        if not faults:
            return Finding(f"finite and not zero in {len(parts)} parts of the parameters")
    more = f" (and {len(faults) - SHOWN} more)" if len(faults) > SHOWN else ""
    fault = (
        f"{'; '.join(faults[:SHOWN])}{more}: the model does not use or does not train it; repair the code "
        "that changed, or run without this check by --skip_checks"
    )
    return Finding("", fault)


def _take_gradient(subject: Subject, scale: float) -> None:
    """Give every parameter the gradient of the first windows' loss, times ``scale``."""
    model, windows = subject.setup.state.model, subject.windows
    model.zero_grad(set_to_none=True)
    with subject.uncompiled():
        with subject.autocast():
            loss = model(windows[:, :-1], windows[:, 1:])
        (loss * scale).backward()


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


def _idle_parts(subject: Subject) -> set[str]:
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
