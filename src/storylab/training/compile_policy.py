"""Whether compiling a run's blocks pays. This module does not load torch."""

from __future__ import annotations

from storylab.config import TrainConfig
from storylab.model.cost import training_flops

# Compiling takes some 15 seconds and saves a sixth to a third of the time (docs/performance.md); this
# much work in the blocks is several minutes on two CPU cores.
COMPILE_FLOPS = 2e14
# An H100 does this much uncompiled in 30 seconds; compiling takes 10 and saves a third (docs/gpu.md).
CUDA_COMPILE_FLOPS = 3e15


def worth_compiling(config: TrainConfig, device: str) -> bool:
    """Whether a run is long enough to win back the time that compiling its blocks takes.

    Depends on the config and the type of its device (cpu, cuda) and not on the machine, so that the same
    run is always computed the same way.
    """
    flops = training_flops(config.model, 0, config.block_size)  # without the head's products
    least = CUDA_COMPILE_FLOPS if device == "cuda" else COMPILE_FLOPS
    return flops * config.total_tokens >= least
