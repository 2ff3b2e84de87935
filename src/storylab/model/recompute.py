"""Activation checkpointing: compute elementwise work twice instead of keeping its results.

On the CPU recomputing is no slower than writing intermediate results to memory and reading them back
(docs/performance.md). Other devices keep everything, as nothing was measured there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Forward = TypeVar("Forward", bound=Callable[..., Any])


def recomputes_activations(x: Tensor) -> bool:
    """Whether activations computed from ``x`` are recomputed in the backward pass."""
    return x.device.type == "cpu" and torch.is_grad_enabled()


def recompute(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, checkpointed: save only ``x`` for the backward pass.

    Meant for ``elementwise -> matmul``: the backward pass recomputes the elementwise part and stops
    before the product. A compiled block is checkpointed as a whole, see :func:`recompute_block`.
    """
    if recomputes_activations(x) and not torch.compiler.is_compiling():
        return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return function(x)


def recompute_block(forward: Forward) -> Forward:
    """Decorate a block's ``forward(self, x, ...)``: checkpoint it as a whole where it is being compiled.

    The backward pass then recomputes everything but the outputs of linear layers.
    """

    @wraps(forward)
    def checkpointed(block: Any, x: Tensor, *others: Any, **named: Any) -> Any:
        if not (torch.compiler.is_compiling() and recomputes_activations(x)):
            return forward(block, x, *others, **named)
        return checkpoint(
            partial(forward, block),
            x,
            *others,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(_save_matmul_outputs, block.feed_forward.down.in_features),
            **named,
        )

    return cast(Forward, checkpointed)


def _save_matmul_outputs(hidden: int) -> Any:
    """Selective-checkpoint policy: save every linear output except the down projection's.

    The down projection is recognized by its ``hidden`` input features; its output is only added to the
    residual stream.
    """

    def policy(_: Any, operation: Any, *operands: Any, **__: Any) -> CheckpointPolicy:
        product = operation == torch.ops.aten.mm.default and operands[1].shape[0] != hidden
        return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
