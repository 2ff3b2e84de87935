"""Quantisers: a tensor to what the matrix units would see of it, kept exact in bfloat16.

A quantiser returns an *operand* and a *scale*: the operand holds element values times their block
scales, at most 8 significant bits each and so exact in bfloat16; the scale is the float32 factor of
the whole tensor. The product of two operands is accumulated in float32 and multiplied by both scales
afterwards, as the hardware does; folding a tensor's scale into its operand would change the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from storylab.precision.formats import (
    E2M1,
    E4M3,
    Format,
    round_nearest,
    round_stochastic,
)

FLOAT32_MAX = torch.finfo(torch.float32).max
NVFP4_BLOCK, MXFP8_BLOCK = 16, 32
# Signs of the random Hadamard transform: one fixed draw, TransformerEngine's.
HADAMARD_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


@dataclass(frozen=True)
class Quantized:
    """``operand`` is float32 and exact in bfloat16; the tensor's value is ``operand * scale``."""

    operand: Tensor
    scale: Tensor

    @property
    def value(self) -> Tensor:
        """What the quantised tensor stands for, float32."""
        return self.operand * self.scale


def per_tensor(values: Tensor, form: Format, amax: Tensor | None = None) -> Quantized:
    """One scale for the tensor: format's largest / amax (TransformerEngine's Float8CurrentScaling,
    or DelayedScaling where ``amax`` comes from the steps before).

    Where amax is 0 or not finite the scale is 1.
    """
    amax = values.abs().amax() if amax is None else amax
    # Tensor by tensor: a number over a tensor is its reciprocal times the number, an ulp off.
    scale = torch.div(torch.full_like(amax, form.largest), amax).clamp(max=FLOAT32_MAX)
    usable = torch.isfinite(amax) & (amax > 0)
    scale = torch.where(usable, scale, torch.ones_like(scale))
    return Quantized(round_nearest(values * scale, form), 1.0 / scale)


def mxfp8(values: Tensor, form: Format = E4M3) -> Quantized:
    """Blocks of 32 along the last axis with a power-of-two scale, its exponent rounded up
    (OCP MX specification; the rounding of Mishra et al. 2025, arXiv 2506.08027)."""
    blocks = _blocks(values, MXFP8_BLOCK)
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    exponent = _exponent_rounded_up(amax * (1.0 / form.largest))
    scale = torch.exp2(exponent)
    scaled = round_nearest(blocks * torch.exp2(-exponent), form)
    return Quantized((scaled * scale).reshape(values.shape), values.new_ones(()))


def _exponent_rounded_up(values: Tensor) -> Tensor:
    """Exponent of the least power of two that is not below ``values``, within E8M0's -127 to 127."""
    bits = values.view(torch.int32)
    exponent = (bits >> 23) - 127
    above = (bits & 0x7FFFFF) != 0
    # Subnormal values have a stored exponent of 0 and lie below 2^-126.
    subnormal = bits < 0x800000
    exponent = torch.where(
        subnormal, torch.where(bits > 0x400000, -126, -127), exponent + above.int()
    )
    return exponent.clamp(-127, 127).float()


def nvfp4(
    values: Tensor,
    square: bool = False,
    random: Tensor | None = None,
    four_over_six: bool = False,
) -> Quantized:
    """NVFP4 (arXiv 2509.25149, appendix B): E2M1 in blocks of 16 along the last axis with an E4M3
    scale, and a float32 scale of the tensor, 6 * 448 / amax.

    Args:
        values: ``[..., K]`` float32, K a multiple of 16.
        square: blocks of 16 x 16 over the last two axes, so that the transpose has the same values.
        random: int32 of the shape of ``values`` for stochastic rounding; None rounds to nearest.
        four_over_six: scale each block to 4 instead of 6 where that errs less
            (Cook et al. 2025, arXiv 2512.02010).
    """
    amax = values.abs().amax()
    largest = 6.0 * 448.0
    encode = torch.div(torch.full_like(amax, largest), amax).clamp(max=FLOAT32_MAX)
    encode = torch.where((amax == 0) | (encode == 0), torch.ones_like(encode), encode)
    if square:
        rows, columns = values.shape[-2:]
        blocks = values.reshape(-1, rows // 16, 16, columns // 16, 16).transpose(2, 3)
        draws = None
        if random is not None:
            draws = random.reshape(-1, rows // 16, 16, columns // 16, 16).transpose(2, 3)
        axes: tuple[int, ...] = (-2, -1)
    else:
        blocks = _blocks(values, NVFP4_BLOCK)
        draws = None if random is None else random.reshape(blocks.shape)
        axes = (-1,)
    block_amax = blocks.abs().amax(dim=axes, keepdim=True)
    operand = _nvfp4_blocks(blocks, block_amax * (encode * (1.0 / 6.0)), encode, draws)
    if four_over_six:
        other = _nvfp4_blocks(blocks, block_amax * (encode * (1.0 / 4.0)), encode, draws)
        wanted = blocks * encode
        errors = [(o - wanted).abs().sum(dim=axes, keepdim=True) for o in (operand, other)]
        operand = torch.where(errors[1] < errors[0], other, operand)
    if square:
        operand = operand.transpose(2, 3)
    return Quantized(operand.reshape(values.shape), 1.0 / encode)


def _nvfp4_blocks(
    blocks: Tensor, wanted_scales: Tensor, encode: Tensor, random: Tensor | None
) -> Tensor:
    """Elements times block scales, given the block scales before their own rounding to E4M3."""
    scales = round_nearest(wanted_scales, E4M3)
    multiplier = (1.0 / (scales * (1.0 / encode))).clamp(max=FLOAT32_MAX)
    scaled = (blocks * multiplier).clamp(-E2M1.largest, E2M1.largest)
    if random is None:
        return round_nearest(scaled, E2M1) * scales
    return round_stochastic(scaled, E2M1, random) * scales


def hadamard(values: Tensor) -> Tensor:
    """The 16-point random Hadamard transform of the last axis, rounded to bfloat16 as the hardware
    passes it on. It is orthogonal, so that on both inputs of a product it cancels."""
    matrix = _hadamard_matrix().to(values.device)
    turned = _blocks(values.bfloat16().float(), 16) @ matrix
    return turned.bfloat16().float().reshape(values.shape)


@cache
def _hadamard_matrix() -> Tensor:
    """diag(signs) H_16 / 4, ``[16, 16]`` float32; Sylvester's construction."""
    matrix = torch.ones(1, 1)
    while len(matrix) < 16:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.tensor(HADAMARD_SIGNS)[:, None] * matrix / math.sqrt(16)


def random_bytes(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform int32 from 0 to 255 for :func:`round_stochastic`, drawn on the CPU."""
    count = shape.numel()
    words = torch.randint(
        -(2**31), 2**31, (-(-count // 4),), dtype=torch.int32, generator=generator
    )
    return words.view(torch.uint8)[:count].to(torch.int32).reshape(shape)


def _blocks(values: Tensor, size: int) -> Tensor:
    return values.reshape(*values.shape[:-1], values.shape[-1] // size, size)
