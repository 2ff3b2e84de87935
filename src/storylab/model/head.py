"""The output head and its cross-entropy, a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from storylab.model.autocast import compute_dtype


@dataclass(frozen=True)
class ChunkSizes:
    """Sizes of the chunks that the head works on.

    Attributes:
        positions: positions per chunk of logits. Too few: bound by reading the weight, and reading and
            writing its gradient, for each chunk. Too many: only memory.
        gradient_rows: rows of the weight's gradient computed at once before they are added in float32.
        vocab_multiple: the vocabulary is padded to a multiple of this by rows of zeros in the weight.
    """

    positions: int
    gradient_rows: int
    vocab_multiple: int


# 103 MB of logits in bfloat16 with 50,257 words. Half as many positions take 1.16 times as long on a
# processor with AMX, which waits for the weight's gradient in memory, and as long on one without.
CPU_CHUNKS = ChunkSizes(positions=1024, gradient_rows=8192, vocab_multiple=1)
# A GPU's caches hold neither a chunk nor a gradient, and its memory has room for 412 MB. Its matrix units
# want rows of logits to begin at multiples of 128 bytes (NVIDIA, Matrix Multiplication Background User's
# Guide, section 3.1); a CPU's do not care (docs/performance.md).
CUDA_CHUNKS = ChunkSizes(positions=4096, gradient_rows=2**31, vocab_multiple=64)
# Rows of logits that a GPU widens to float32 at once (103 MB).
CUDA_SOFTMAX_ROWS = 512
# Logits that a CPU thread widens to float32 at once (1 MB), so that a softmax's passes stay in its cache.
CPU_SOFTMAX_ELEMENTS = 2**18


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, compiled: bool = False
) -> Tensor:
    """Sum over positions of the cross-entropy of ``targets`` under logits ``hidden @ weight.T``.

    The products run in the dtype that autocast has chosen for the device, the softmax in float32.
    The gradient is computed together with the loss, while a chunk's logits are in memory; it cannot
    be differentiated again.

    Args:
        hidden: ``[N, C]``.
        weight: ``[V, C]``.
        targets: ``[N]`` int64.
        compiled: make loss and gradient of a chunk in one compiled kernel, on a GPU: there the
            softmax takes most of the time, not the products (from 10.2 to 5.1 ms for 8,192
            positions on an H100).

    Returns:
        The sum in nats, a float32 scalar.
    """
    losses = _losses_in_one_kernel if compiled and hidden.device.type == "cuda" else _losses
    total: Tensor = LinearCrossEntropy.apply(hidden, weight, targets, compute_dtype(hidden), losses)
    return total


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every position in nats, ``[N]`` float32; arguments as above, no gradient."""
    dtype = compute_dtype(hidden)
    hidden, low_weight = hidden.to(dtype), _low_weight(weight, dtype)
    positions = chunk_sizes(hidden.device).positions
    losses = [
        _losses((chunk @ low_weight.T).narrow(1, 0, len(weight)), wanted)
        for chunk, wanted in zip(hidden.split(positions), targets.split(positions), strict=True)
    ]
    return torch.cat(losses)


def chunk_sizes(device: torch.device) -> ChunkSizes:
    """The chunk sizes for ``device``."""
    return CUDA_CHUNKS if device.type == "cuda" else CPU_CHUNKS


def padded_vocab_size(vocab_size: int, device: torch.device) -> int:
    """Number of logits that are computed; those from ``vocab_size`` on are zero and are dropped."""
    return vocab_size + -vocab_size % chunk_sizes(device).vocab_multiple


def _low_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight [V, C]`` in ``dtype``, padded with rows of zeros to the vocabulary's multiple.

    The caller drops the logits of these rows before the softmax; as they stay 0, they add nothing to
    any gradient.
    """
    padded = padded_vocab_size(len(weight), weight.device)
    if padded == len(weight):
        return weight.to(dtype)
    low = weight.new_zeros(padded, weight.shape[1], dtype=dtype)
    low.narrow(0, 0, len(weight)).copy_(weight)
    return low


def _softmax_rows(logits: Tensor) -> int:
    if logits.device.type != "cpu":
        return CUDA_SOFTMAX_ROWS
    return max(1, CPU_SOFTMAX_ELEMENTS * torch.get_num_threads() // logits.shape[1])


def _losses(logits: Tensor, targets: Tensor, gradient: bool = False) -> Tensor:
    """Losses ``[N]`` of ``logits [N, V]``; with ``gradient`` the logits become dloss/dlogits."""
    losses = []
    rows = _softmax_rows(logits)
    for part, wanted in zip(logits.split(rows), targets.unsqueeze(1).split(rows), strict=True):
        wide = part.float()
        if not gradient:
            losses.append(-wide.log_softmax(dim=-1).gather(1, wanted).squeeze(1))
            continue
        # One pass of exp gives both: the largest probability is exp(0) over the sum.
        below_largest = wide.amax(dim=1, keepdim=True) - wide.gather(1, wanted)
        difference = wide.softmax(dim=-1)
        log_sum = -difference.amax(dim=1, keepdim=True).log()
        losses.append((below_largest + log_sum).squeeze(1))
        difference.scatter_add_(1, wanted, difference.new_full(wanted.shape, -1.0))
        part.copy_(difference)
    return torch.cat(losses)


def _losses_in_one_kernel(logits: Tensor, targets: Tensor, gradient: bool = False) -> Tensor:
    """:func:`_losses`, the logits being read and written once."""
    if not gradient:
        return _losses(logits, targets)
    # Read outside: torch 2.11's compiler moves a read of the target's logit behind the write in place.
    right = logits.gather(1, targets.unsqueeze(1)).squeeze(1).float()
    log_sum: Tensor = _softmax_kernel()(logits, targets)
    return log_sum - right


@cache
def _softmax_kernel() -> Any:
    def softmax_minus_one(logits: Tensor, targets: Tensor) -> Tensor:
        """Turn ``logits [N, V]`` into softmax - 1 at ``targets [N]``; return log sum exp, ``[N]``."""
        wide = logits.float()
        log_sum = wide.logsumexp(dim=1, keepdim=True)
        # A comparison, as scattering would be done by atomic additions to a copy.
        columns = torch.arange(logits.shape[1], device=logits.device)
        logits.copy_((wide - log_sum).exp() - (columns == targets.unsqueeze(1)).float())
        return log_sum.squeeze(1)

    return torch.compile(softmax_minus_one, dynamic=False, fullgraph=True)


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies, chunk by chunk; profiles find the head by the name of this class."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        losses: Callable[..., Tensor],
    ) -> Tensor:
        low_hidden, low_weight = hidden.to(dtype), _low_weight(weight, dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(low_hidden)
        weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        sizes = chunk_sizes(hidden.device)
        buffer = low_hidden.new_empty(min(sizes.positions, len(targets)), len(low_weight))
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = (
                tensor.split(sizes.positions) for tensor in (low_hidden, hidden_grad, targets)
            )
            for states, states_grad, wanted in zip(*chunks, strict=True):
                padded = buffer.narrow(0, 0, len(wanted))
                torch.mm(states, low_weight.T, out=padded)
                logits = padded.narrow(1, 0, len(weight))
                total += losses(logits, wanted, gradient=True).sum()
                torch.mm(padded, low_weight, out=states_grad)
                rows = (
                    logits.split(sizes.gradient_rows, 1),
                    weight_grad.split(sizes.gradient_rows),
                )
                for part, grad in zip(*rows, strict=True):
                    grad += part.T @ states
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        # In float32: under float16 loss scaling `grad` alone can exceed the 16-bit range.
        scaled = hidden_grad.float() * grad
        # In place: nothing else reads it, and it is as large as the embedding.
        weight_grad = weight_grad.mul_(grad).to(weight_dtype)
        return scaled.to(hidden_dtype), weight_grad, None, None, None
