"""Quantization kernels: map a tensor to the values the matrix units would see, exact in bfloat16.

A kernel returns an *operand* and a *scale*. The operand holds element values times their block scales:
at most 8 significant bits each, and so exact in bfloat16. The scale is the float32 factor of the whole
tensor, or of each row. The product of two operands is accumulated in float32 and multiplied by both
scales afterwards, as the hardware does; folding a tensor's scale into its operand would change the
result.

Each kernel has two steps: find the largest magnitude of the tensor, then make one pass over its
elements, which the compiler turns into one kernel. :mod:`storylab.precision.scalings` calls them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from storylab.precision.formats import E2M1, E4M3, Format
from storylab.precision.fused import fused
from storylab.precision.rounding import round_nearest, stochastic_round
from storylab.precision.scalings import MXFP8_BLOCK, NVFP4_BLOCK

FLOAT32_MAX = torch.finfo(torch.float32).max
# Signs of the 16-point random Hadamard transform: one fixed draw, the same as TransformerEngine's.
HADAMARD_SIZE = 16
HADAMARD_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


@dataclass(frozen=True)
class Quantized:
    """A quantized tensor, ``operand * scale``.

    Attributes:
        operand: ``[M, K]`` float32, exact in bfloat16.
        scale: float32, a scalar for the tensor or ``[M, 1]``, one for each row.
    """

    operand: Tensor
    scale: Tensor

    @property
    def value(self) -> Tensor:
        """The values that the quantized tensor represents, float32."""
        return self.operand * self.scale

    @property
    def T(self) -> Quantized:  # noqa: N802 - torch's name
        """The transpose, without a copy; only where one scale covers the tensor."""
        return Quantized(self.operand.T, self.scale)


def wrong_kernels() -> list[str]:
    """Names of the passes whose compiled kernel gave a wrong result in this process."""
    passes = (_per_tensor_pass, _mxfp8_pass, _nvfp4_pass, _nvfp4_square_pass)
    return [each.name for each in passes if each.wrong]


def tensor_amax(values: Tensor) -> Tensor:
    """max |x|, a float32 scalar, in one pass; NaN if there is one."""
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high).float()


def per_tensor(values: Tensor, form: Format, amax: Tensor | None = None) -> Quantized:
    """One scale for the tensor, the format's max / amax (TransformerEngine's Float8CurrentScaling,
    or DelayedScaling where ``amax`` comes from the steps before).

    Where amax is 0 or not finite the scale is 1.
    """
    scale = per_tensor_scale(tensor_amax(values) if amax is None else amax, form)
    return Quantized(_per_tensor_pass(values, scale, form), 1.0 / scale)


def per_tensor_scale(amax: Tensor, form: Format) -> Tensor:
    """The factor that takes a tensor with this largest magnitude to the format's, float32."""
    # Tensor by tensor: a number over a tensor is its reciprocal times the number, an ulp off.
    scale = torch.div(torch.full_like(amax, form.max), amax).clamp(max=FLOAT32_MAX)
    usable = torch.isfinite(amax) & (amax > 0)
    return torch.where(usable, scale, torch.ones_like(scale))


@fused
def _per_tensor_pass(values: Tensor, scale: Tensor, form: Format) -> Tensor:
    return round_nearest(values.float() * scale, form)


def per_row(values: Tensor, form: Format) -> Quantized:
    """One scale for each row of ``values [M, K]``: the greatest power of two that keeps it in the
    format's range (torchao's rowwise scaling). The scale is ``[M, 1]``."""
    scale = per_row_scale(values, form)
    return Quantized(_per_tensor_pass(values, scale, form), 1.0 / scale)


def per_row_scale(values: Tensor, form: Format) -> Tensor:
    """The factors of :func:`per_row` for ``values [M, K]``: ``[M, 1]`` float32."""
    amax = values.abs().amax(dim=1, keepdim=True).float()
    ratio = torch.div(torch.full_like(amax, form.max), amax.clamp(min=1e-12))
    # Its exponent bits alone are the power of two below it.
    return (ratio.view(torch.int32) & 0x7F800000).view(torch.float32)


def mxfp8(values: Tensor, form: Format = E4M3) -> Quantized:
    """Blocks of 32 along the last axis with a power-of-two scale, its exponent rounded up
    (OCP MX specification; the rounding of Mishra et al. 2025, arXiv 2506.08027)."""
    operand = _mxfp8_pass(values.reshape(-1), form).view(values.shape)
    return Quantized(operand, torch.ones((), device=values.device))


@fused
def _mxfp8_pass(values: Tensor, form: Format) -> Tensor:
    blocks = values.float().view(-1, MXFP8_BLOCK)
    exponent = mxfp8_exponents(blocks, form)
    scaled = round_nearest(blocks * torch.exp2(-exponent), form)
    return (scaled * torch.exp2(exponent)).view(-1)


def mxfp8_exponents(blocks: Tensor, form: Format) -> Tensor:
    """Exponent of the least power of two that takes a block ``[N, 32]`` into the format's range,
    within E8M0's -127 to 127: ``[N, 1]`` float32."""
    wanted = blocks.abs().amax(dim=-1, keepdim=True) * (1.0 / form.max)
    bits = wanted.view(torch.int32)
    exponent = (bits >> 23) - 127
    above = (bits & 0x7FFFFF) != 0
    # Subnormal values have a stored exponent of 0 and are below 2^-126.
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
        values: ``[M, K]`` float32 or bfloat16, K a multiple of 16.
        square: blocks of 16 x 16 (M a multiple of 16), so that the transpose has the same values.
        random: uint8 of the shape of ``values`` for stochastic rounding; None rounds to nearest.
        four_over_six: scale each block to 4 instead of 6 where that errs less (Cook et al. 2025,
            arXiv 2512.02010). The tensor's scale stays 6 * 448 / amax, so that the largest blocks stay at
            6; a scale of 6 * 256 / amax would leave room for every block.
    """
    encode = global_encode_scale(tensor_amax(values))
    if square:
        operand = _nvfp4_square_pass(values, encode, random, four_over_six)
    else:
        draws = None if random is None else random.reshape(-1)
        operand = _nvfp4_pass(values.reshape(-1), encode, draws, four_over_six)
    return Quantized(operand.view(values.shape), 1.0 / encode)


def global_encode_scale(amax: Tensor) -> Tensor:
    """The factor 6 * 448 / amax that takes a tensor into the range of elements and scales."""
    encode = torch.div(torch.full_like(amax, E2M1.max * E4M3.max), amax).clamp(max=FLOAT32_MAX)
    return torch.where((amax == 0) | (encode == 0), torch.ones_like(encode), encode)


@fused
def _nvfp4_pass(
    values: Tensor, encode: Tensor, random: Tensor | None, four_over_six: bool
) -> Tensor:
    blocks = values.float().view(-1, NVFP4_BLOCK)
    draws = None if random is None else random.view(-1, NVFP4_BLOCK)
    return _nvfp4_blocks(blocks, encode, draws, (-1,), four_over_six).view(-1)


@fused
def _nvfp4_square_pass(
    values: Tensor, encode: Tensor, random: Tensor | None, four_over_six: bool
) -> Tensor:
    rows, columns = values.shape
    shape = (rows // NVFP4_BLOCK, NVFP4_BLOCK, columns // NVFP4_BLOCK, NVFP4_BLOCK)
    draws = None if random is None else random.view(shape)
    return _nvfp4_blocks(values.float().view(shape), encode, draws, (1, 3), four_over_six).view(
        rows, columns
    )


def _nvfp4_blocks(
    blocks: Tensor,
    encode: Tensor,
    random: Tensor | None,
    axes: tuple[int, ...],
    four_over_six: bool,
) -> Tensor:
    """Elements times block scales; ``axes`` are those of a block."""
    amax = blocks.abs().amax(dim=axes, keepdim=True)
    operand = _nvfp4_elements(blocks, nvfp4_scales(amax, encode, E2M1.max), encode, random)
    if four_over_six:
        other = _nvfp4_elements(blocks, nvfp4_scales(amax, encode, 4.0), encode, random)
        wanted = blocks * encode
        # In float64 (which MPS lacks), or the order of the sum would decide where the two are close.
        wide = torch.float32 if blocks.device.type == "mps" else torch.float64
        errors = [(o - wanted).abs().to(wide).sum(dim=axes, keepdim=True) for o in (operand, other)]
        operand = torch.where(errors[1] < errors[0], other, operand)
    return operand


def nvfp4_scales(amax: Tensor, encode: Tensor, target: float) -> Tensor:
    """E4M3 scales that take blocks of these largest magnitudes to ``target``."""
    return round_nearest(amax * (encode * (1.0 / target)), E4M3)


def _nvfp4_elements(
    blocks: Tensor, scales: Tensor, encode: Tensor, random: Tensor | None
) -> Tensor:
    multiplier = (1.0 / (scales * (1.0 / encode))).clamp(max=FLOAT32_MAX)
    scaled = (blocks * multiplier).clamp(-E2M1.max, E2M1.max)
    if random is None:
        return round_nearest(scaled, E2M1) * scales
    return stochastic_round(scaled, E2M1, random) * scales


def hadamard(values: Tensor) -> Tensor:
    """The 16-point random Hadamard transform of the last axis of ``values``, rounded to bfloat16 as in
    hardware. The transform is orthogonal: applied to both operands of a product it cancels."""
    matrix = _hadamard_matrix(values.device)
    # Sums of 16 bfloat16 numbers over 4, made in float32 and rounded once.
    turned = values.bfloat16().view(-1, HADAMARD_SIZE) @ matrix
    return turned.view(values.shape)


@cache
def _hadamard_matrix(device: torch.device) -> Tensor:
    """diag(signs) H_16 / 4, ``[16, 16]`` bfloat16; Sylvester's construction. A GPU gets it once, as the
    host waits for the copy."""
    matrix = torch.ones(1, 1)
    while len(matrix) < HADAMARD_SIZE:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    signed = torch.tensor(HADAMARD_SIGNS)[:, None] * matrix / math.sqrt(HADAMARD_SIZE)
    return signed.bfloat16().to(device)


def random_bytes(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform uint8 for :func:`stochastic_round`, drawn on the CPU."""
    count = shape.numel()
    words = torch.randint(
        -(2**31), 2**31, (-(-count // 4),), dtype=torch.int32, generator=generator
    )
    return words.view(torch.uint8)[:count].view(shape)


def hashed_bytes(shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """Uniform uint8 for :func:`stochastic_round`, made on ``device``: a hash of the seed and of each
    place (the SplitMix64 generator of Steele, Lea & Flood 2014).

    Equal on all devices, but not to :func:`random_bytes`, whose draws take less time on a CPU.
    """
    count = shape.numel()
    # Sums and products of int64 wrap; a shift of it brings in copies of the sign, which are masked.
    x = torch.arange(1, -(-count // 8) + 1, device=device) * (0x9E3779B97F4A7C15 - 2**64) + seed
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    x ^= (x >> 31) & (2**33 - 1)
    return x.view(torch.uint8)[:count].view(shape)


def padded(values: Tensor, columns: int, rows: int = 1) -> Tensor:
    """Pad ``values [M, K]`` with zeros to multiples of ``rows`` and ``columns``; zeros add nothing to a
    product."""
    missing = (0, -values.shape[1] % columns, 0, -values.shape[0] % rows)
    return nn.functional.pad(values, missing) if any(missing) else values
