"""Features of GPUs that low-precision training needs, by CUDA compute capability.

A feature is one entry of :data:`FEATURES`. This module does not load torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Capability = tuple[int, int]
ADA: Capability = (8, 9)
# TransformerEngine 2.20, docs/features/low_precision_training: "Training: SM 10.0, SM 10.3".
DATACENTER_BLACKWELL: tuple[Capability, ...] = ((10, 0), (10, 3))
GEFORCE_BLACKWELL = 12


@dataclass(frozen=True)
class Feature:
    """An ability that the matrix units of a GPU have or lack.

    Attributes:
        name: in messages.
        present: whether a GPU of a compute capability has it.
    """

    name: str
    present: Callable[[Capability], bool]


FP8 = Feature("FP8", lambda capability: capability >= ADA)
MXFP8 = Feature("MXFP8", lambda capability: capability in DATACENTER_BLACKWELL)
NVFP4 = Feature(
    "NVFP4",
    lambda capability: capability in DATACENTER_BLACKWELL or capability[0] == GEFORCE_BLACKWELL,
)
FEATURES = (FP8, MXFP8, NVFP4)


def device_features(capability: Capability) -> list[str]:
    """Names of the features of a GPU with this compute capability."""
    return [feature.name for feature in FEATURES if feature.present(capability)]
