"""RMSNorm and rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storylab.model.language_model import Shape

# Added to the mean square in every norm of the model, as in Llama 2 and 3.
NORM_EPS = 1e-5


def rms_norm(x: Tensor, gain: Tensor | None = None) -> Tensor:
    """x / rms(x) over the last axis, times ``gain`` of that size if there is one."""
    return F.rms_norm(x, x.shape[-1:], gain, NORM_EPS)


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.to(self.weight.dtype), self.weight)


def rope_cos_sin(config: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, each ``[T, D]`` float32, at ``positions [T]`` (Su et al.
    2021, arXiv 2104.09864).

    Channel i of the first half of a head and channel i of the second half rotate together by
    position * base^(-2i/D), the layout of Llama in `transformers`; both halves hold the same angles.
    """
    half = config.head_size // 2
    exponents = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    angles = positions.float().unsqueeze(1) * config.rope_base**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [B, heads, T, D]`` by the rotary angles; the result has the dtype of ``x``."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
