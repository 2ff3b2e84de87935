"""Initial weights of a model, each drawn by the name of its parameter."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

INIT_STD = 0.02
# Projections that write to the residual stream, by the end of their names.
RESIDUAL_WRITERS = ("attention.out.weight", "feed_forward.down.weight")
# Initial values of the parameters that only some configs have, by the end of their names.
CONSTANT_INIT: dict[str, float | tuple[float, ...]] = {
    "value_scale": 0.5,
    "residual_scales": (1.0, 0.0),
}


@torch.no_grad()
def initialize_weights(model: nn.Module, n_layer: int, seed: int) -> None:
    """Give every parameter of ``model`` its initial values, as GPT-2 does (Radford et al. 2019).

    Matrices are N(0, 0.02), those that write to the residual stream N(0, 0.02/sqrt(2L)). Norm gains are
    1, the scales of optional parts constants.

    The values of a parameter depend on the seed, its name and its shape alone. So models that differ in
    one part begin with the same values everywhere else. With another number of layers, the projections
    that write to the residual stream are the same draws on another scale.

    Args:
        model: its parameters are on the CPU, so that a seed gives the same values for every device.
        n_layer: L, number of blocks.
        seed: seed of the draws.
    """
    for name, parameter in model.named_parameters():
        constant = next((x for end, x in CONSTANT_INIT.items() if name.endswith(end)), None)
        if constant is not None:
            parameter.copy_(torch.tensor(constant))
        elif parameter.dim() < 2:
            parameter.fill_(1.0)
        else:
            writes_residual = name.endswith(RESIDUAL_WRITERS)
            std = INIT_STD / math.sqrt(2 * n_layer) if writes_residual else INIT_STD
            parameter.normal_(0.0, std, generator=_named_generator(seed, name))


def _named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose draws depend on ``seed`` and ``name`` alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
