"""One run on several processes that each hold a share of the weights, gradients and optimizer's state:
FSDP2, torch's ``fully_shard``.

Every matrix is divided by rows. A block's matrices are gathered before it computes, forwards and backwards,
and dropped afterwards; the embedding stays from the forward to the backward pass. Vectors and scalars are a
thousandth of the weights, and FSDP2 takes no scalars: they are whole on every rank, and summed as in
:mod:`storylab.training.parallel`, whose division of micro-batches and evaluations is used here too. So the
numbers are those of whole weights, except for the order of additions.

A rank adds up the gradients of its micro-batches. They are whole until they are reduced, once an iteration.
An evaluation gathers all weights first.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from traceback import clear_frames
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import get_total_norm

from storylab.config import TrainConfig
from storylab.errors import UserError
from storylab.model.transformer import Transformer
from storylab.training.allocator import return_freed_memory
from storylab.training.parallel import TorchRanks, gather_into
from storylab.training.precision import ComputePolicy


class Collective:
    """A collective of FSDP2, by the interface that it has for others' collectives.

    Args:
        work: of torch.distributed.
        connected: context that names a lost rank.
    """

    def __init__(self, work: Callable[..., Any], connected: Callable[[], Any]) -> None:
        self._work, self._connected = work, connected

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for it."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **options: Any
    ) -> Any:
        """Do it."""
        with self._connected():
            return self._work(output_tensor, input_tensor, *args, **options)


class ShardedRanks(TorchRanks):
    """Processes of which each holds a share of the model.

    Raises:
        RankLost: by every method, where another process has ended.
        UserError: this version of torch lacks a part of FSDP2.
    """

    def __init__(self) -> None:
        super().__init__()
        if not hasattr(FSDPModule, "set_custom_all_gather"):
            raise UserError(
                f"--parallel fsdp needs a newer torch than {torch.__version__}: update it, or use "
                "--parallel ddp"
            )
        self._model: Any = None
        self._mesh: Any = None
        self._modules: tuple[Any, ...] = ()

    def require(self, config: TrainConfig, precision: ComputePolicy) -> None:
        """See :class:`Ranks`."""
        super().require(config, precision)
        if precision.recipe is not None or precision.dtype == torch.float16:
            raise UserError(
                f"--parallel fsdp is for --dtype bfloat16 and float32: use --parallel ddp for "
                f"{config.dtype}"
            )

    def follow(self, model: nn.Module) -> bool:
        """See :class:`Ranks`."""
        assert isinstance(model, Transformer)
        return_freed_memory()
        device = next(model.parameters()).device
        self._model = model
        self._mesh = self._mesh or init_device_mesh(device.type, (self.size,))
        vectors = {p for p in model.parameters() if p.dim() < 2}
        gather = Collective(gather_into, self._connected)
        reduce = Collective(_scatter_sum, self._connected)
        self._modules = (*model.blocks, model)
        for module in self._modules:
            fully_shard(module, mesh=self._mesh, ignored_params=vectors)
            # A sum, as the micro-batches' losses are parts of their mean already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(reduce)
        # By default a backward pass gathers ahead in the order of the forward passes before it. Those of an
        # evaluation count too, of which ranks have different numbers, so they would gather other weights.
        for module, ahead in pairwise(reversed(self._modules)):
            module.set_modules_to_backward_prefetch([ahead])
        self._modules[0].set_modules_to_backward_prefetch([model])  # which is whole until the end
        with torch.no_grad():  # the first pass must be the model's, not a block's
            model(torch.zeros(1, 1, dtype=torch.int64, device=device))
        self._model.reshard()
        return True

    def shares(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Ranks`."""
        return {name: self._share(tensor) for name, tensor in tensors.items()}

    def _share(self, tensor: Tensor) -> Tensor:
        if tensor.dim() < 2 or isinstance(tensor, DTensor):
            return tensor
        # Every rank has the whole tensor, so nothing is sent.
        return distribute_tensor(tensor, self._mesh, [Shard(0)], src_data_rank=None)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Ranks`."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            with self._connected():
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.leads:
                found[name] = full.cpu()
        return found

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """See :class:`Ranks`. Whole weights on every rank: a sample would gather them for each token, and
        ranks with fewer batches of an evaluation would have to gather along."""
        self._model.set_reshard_after_forward(False)
        for module in self._modules:
            module.unshard()
        try:
            yield
        finally:
            for module in self._modules:
                module.reshard()
            for block in self._model.blocks:
                block.set_reshard_after_forward(True)

    def _sum_next(self, last: bool) -> None:
        self._model.set_requires_gradient_sync(last)

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """See :class:`Ranks`."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        shards = [g.to_local() for g in gradients if isinstance(g, DTensor)]
        vectors = [g for g in gradients if not isinstance(g, DTensor)]
        squares = get_total_norm(shards).square()
        self.add(squares)
        norm = (squares + get_total_norm(vectors).square()).sqrt()
        torch._foreach_mul_(shards + vectors, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def close(self) -> None:
        """See :class:`TorchRanks`.

        First drops all that holds a process group: a sharded model in the frames of an error, and the mesh,
        which caches of DTensor keep. The threads of a kept group can abort the process at its end.
        """
        getattr(self._mesh, "_pg_registry", {}).clear()
        self._model, self._mesh, self._modules = None, None, ()
        error = sys.exception()
        while error is not None:
            clear_frames(error.__traceback__)
            error = error.__context__
        gc.collect()
        super().close()

    def divide(self, work: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
        """See :class:`Ranks`. Here :meth:`by_matrix` has divided the matrices."""
        return work(stack)

    @contextmanager
    def by_matrix(
        self, matrices: dict[Tensor, tuple[Tensor, ...]]
    ) -> Iterator[dict[Tensor, tuple[Tensor, ...]]]:
        """See :class:`Ranks`. Each rank gets every ``size``-th matrix, the largest ones first."""
        order = sorted(matrices, key=lambda parameter: parameter.numel(), reverse=True)
        owned = [order[owner :: self.size] for owner in range(self.size)]
        own, ranks = owned[self.rank], range(self.size)
        local = {p: [_local(tensor) for tensor in matrices[p]] for p in order}
        received = self._exchange(
            [[rows for p in theirs for rows in local[p]] for theirs in owned],
            [[self._share_shape(t, rank) for p in own for t in matrices[p]] for rank in ranks],
        )
        joined = iter([torch.cat(rows) for rows in zip(*received, strict=True)])
        whole = {p: tuple(next(joined) for _ in matrices[p]) for p in own}
        yield whole
        received = self._exchange(
            [[t[self._rows(len(t), rank)] for p in own for t in whole[p][1:]] for rank in ranks],
            [[rows.shape for p in theirs for rows in local[p][1:]] for theirs in owned],
        )
        for theirs, parts in zip(owned, received, strict=True):
            written = [rows for p in theirs for rows in local[p][1:]]
            torch._foreach_copy_(written, parts)

    def _rows(self, count: int, rank: int) -> slice:
        """The rows that a rank holds of a matrix of ``count`` rows, as DTensor divides them."""
        share = -(-count // self.size)
        return slice(min(rank * share, count), min((rank + 1) * share, count))

    def _share_shape(self, matrix: Tensor, rank: int) -> torch.Size:
        rows = self._rows(len(matrix), rank)
        return torch.Size((rows.stop - rows.start, *matrix.shape[1:]))

    def _exchange(
        self, outgoing: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[torch.Size]]
    ) -> list[list[Tensor]]:
        """Send the tensors ``outgoing[r]`` to each rank r, and get those of ``shapes[r]`` from it."""
        flat = torch.cat([tensor.flatten() for part in outgoing for tensor in part])
        sent = [sum(tensor.numel() for tensor in part) for part in outgoing]
        sizes = [[shape.numel() for shape in part] for part in shapes]
        received = flat.new_empty(sum(map(sum, sizes)))
        with self._connected():
            dist.all_to_all_single(received, flat, [sum(part) for part in sizes], sent)
        pieces = iter(received.split([size for part in sizes for size in part]))
        return [[next(pieces).view(shape) for shape in part] for part in shapes]


def _local(tensor: Tensor) -> Tensor:
    """The rows that this rank holds."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def _scatter_sum(own: Tensor, whole: Tensor, **options: Any) -> Any:
    """torch.distributed's collective, by its name in this version of torch."""
    newer = getattr(dist, "reduce_scatter_single", None)
    return (newer or dist.reduce_scatter_tensor)(own, whole, **options)
