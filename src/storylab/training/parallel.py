"""One run on several processes, as torchrun starts them: each takes its share, and rank 0 alone writes.

Every process (rank) has the whole model and makes the whole batch of an iteration. It trains on every
``size``-th micro-batch. The gradients are then summed over the ranks, once an iteration. So the iteration
is the one of a single process, except for the order of additions: each rank adds up its own micro-batches
in their order, and the library adds up the ranks. A micro-batch is never cut, so scales of quantized
tensors are those of a single process.

Collectives are torch.distributed's. The gradient of a matrix is summed on its own, as soon as the last
micro-batch has added to it; all vectors and the loss are summed together. torch's DistributedDataParallel
would move gradients between its buckets after the first iteration, and so change the order of additions
where more than two ranks meet: a resumed run would have other bits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from signal import SIGTERM
from typing import TypeVar

import torch
import torch.distributed as dist

# Imported before there is a process group: its functions keep the group that they meet as a default
# argument, and the compiler imports it. The threads of a kept group can abort the process at its end.
import torch.distributed.nn
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from storylab.config import TrainConfig
from storylab.errors import Interrupted, UserError
from storylab.locks import exclusive
from storylab.record.folder import RunFolder
from storylab.training.precision import ComputePolicy
from storylab.training.ranks import ONE_PROCESS, Ranks
from storylab.training.silent_folder import SilentFolder

T = TypeVar("T")
# A rank that answers nothing for so long counts as lost. One that ends is noticed at once.
TIMEOUT = timedelta(minutes=10)
# Bytes of a text that ranks compare.
TEXT_BYTES = 8192


class RankLost(Interrupted):
    """Another process of the run has ended, so that this one cannot go on. Nothing more is saved."""

    def __init__(self, error: Exception) -> None:
        # gloo's messages begin with a line of its source and end with advice.
        reason = re.sub(r"^\[\S*\] *", "", str(error)).partition("\n")[0].partition(". ")[0]
        super().__init__(
            f"another process of this run has ended ({reason[:200]}): the run goes on from its last "
            "checkpoint with `storylab resume`",
            SIGTERM,
        )


class TorchRanks(Ranks):
    """The processes that torchrun has started, joined by torch.distributed.

    Host values go through gloo, a GPU's tensors through nccl.

    Raises:
        RankLost: by every method, where another process has ended.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.lost = False
        self._sums: list[dist.Work] = []
        self._last_micro_batch = False

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch has no narrower class for gloo
            self.lost = True
            raise RankLost(error) from error

    def require(self, config: TrainConfig, precision: ComputePolicy) -> None:
        """See :class:`Ranks`."""
        steps, sequences = config.gradient_accumulation_steps, config.batch_size
        if steps < self.size:
            raise UserError(
                f"{self.size} processes divide the micro-batches of an iteration, and there are {steps}: "
                f"use at most {steps} processes, or for a new run smaller micro-batches (--batch_size "
                f"{max(sequences * steps // self.size, 1)} --gradient_accumulation_steps {self.size})"
            )
        if precision.device.type not in ("cpu", "cuda") or precision.device.index is not None:
            raise UserError(
                f"--device {config.device} is for one process: several take --device cpu, or "
                "--device cuda, which gives each its own GPU"
            )
        if precision.hardware is not None:
            raise UserError(
                f"--backend {precision.backend} is for one process: use --backend emulated, or "
                "leave torchrun out"
            )
        if config.quantization_stats:
            raise UserError(
                "--quantization_stats sees the tensors of one process: leave it out, or leave torchrun out"
            )

    def require_same(self, words: Callable[[], str]) -> None:
        """See :class:`Ranks`."""
        own = words()
        if self.any(self.text(own) != own):
            raise UserError(
                "the processes of this run differ in their config, data, code or checkpoint: give all "
                "machines the same, and a run folder that all of them see"
            )

    def follow(self, model: nn.Module) -> None:
        """See :class:`Ranks`."""
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.register_post_accumulate_grad_hook(self._gradient_ready)

    def _gradient_ready(self, parameter: Tensor) -> None:
        if self._last_micro_batch:
            assert parameter.grad is not None
            with self._connected():
                work = dist.all_reduce(parameter.grad, async_op=True)
            assert work is not None
            self._sums.append(work)

    def micro_batches(
        self, parts: Sequence[Tensor], between: Callable[[], None]
    ) -> Iterator[Tensor]:
        """See :class:`Ranks`."""
        own = parts[self.rank :: self.size]
        between()
        try:
            for number, part in enumerate(own, start=1):
                self._last_micro_batch = number == len(own)
                yield part
        finally:
            self._last_micro_batch = False

    def sum_gradients(self, model: nn.Module, loss: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        vectors = [p.grad for p in model.parameters() if p.dim() < 2 and p.grad is not None]
        together = torch.cat([loss.view(1), *(vector.view(-1) for vector in vectors)])
        self.add(together)
        with self._connected():
            for work in self._sums:
                work.wait()
        self._sums.clear()
        total, *sums = together.split([1, *(vector.numel() for vector in vectors)])
        for vector, summed in zip(vectors, sums, strict=True):
            vector.copy_(summed.view_as(vector))
        return total.squeeze(0)

    def turns(self, items: Sequence[T], before: Callable[[T], None]) -> Iterator[T]:
        """See :class:`Ranks`."""
        for first in range(0, len(items), self.size):
            own = items[first : first + self.size][self.rank :]
            before(own[0] if own else items[-1])
            yield from own[:1]

    def divide(self, work: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        share = -(-len(stack) // self.size)
        own = stack[self.rank * share :][:share]
        done = stack.new_zeros(share, *stack.shape[1:], dtype=torch.bfloat16)
        if len(own):
            done[: len(own)] = work(own)
        gathered = done.new_empty(share * self.size, *stack.shape[1:])
        with self._connected():
            # As bytes: not every version of gloo gathers bfloat16.
            dist.all_gather_into_tensor(gathered.view(torch.uint8), done.view(torch.uint8))
        return gathered[: len(stack)]

    def add(self, tensor: Tensor) -> None:
        """See :class:`Ranks`."""
        with self._connected():
            dist.all_reduce(tensor)

    def largest(self, tensors: Sequence[Tensor]) -> None:
        """See :class:`Ranks`."""
        if not tensors:
            return
        stacked = torch.stack(list(tensors))
        with self._connected():
            dist.all_reduce(stacked, dist.ReduceOp.MAX)
        torch._foreach_copy_(list(tensors), list(stacked))

    def sum(self, values: Sequence[float]) -> list[float]:
        """See :class:`Ranks`."""
        sums = torch.tensor(values, dtype=torch.float64)
        self.add(sums)
        return sums.tolist()

    def highest(self, value: int) -> int:
        """See :class:`Ranks`."""
        number = torch.tensor(value, dtype=torch.int64)
        with self._connected():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def text(self, text: str) -> str:
        """See :class:`Ranks`."""
        data = text.encode("utf-8", "surrogateescape")[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
        letters = torch.tensor(list(data), dtype=torch.uint8)
        with self._connected():
            dist.broadcast(letters, 0)
        return bytes(letters.tolist()).rstrip(b"\0").decode("utf-8", "surrogateescape")

    def folder(self, folder: Path) -> RunFolder:
        """See :class:`Ranks`."""
        return RunFolder(folder) if self.leads else SilentFolder(folder)

    def hold(self, folder: Path) -> AbstractContextManager[None]:
        """See :class:`Ranks`."""
        return exclusive(folder) if self.leads else nullcontext()


def process_count() -> int:
    """Number of processes that torchrun, or a launcher with its variables, has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def may_restart() -> bool:
    """Whether torchrun starts the processes again after one of them has failed."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def restarted() -> bool:
    """Whether torchrun has started the processes again, after one of them had failed."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the processes of this run while the block runs; at once if there is only one.

    Args:
        device: the config's. Unless it is cpu, each process of a machine with GPUs takes one of them.

    Raises:
        UserError: there are fewer GPUs than processes.
        RankLost: the other processes cannot be reached.
    """
    if process_count() == 1:
        yield ONE_PROCESS
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        _take_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps one store, with the addresses of processes that have ended.
            store = dist.PrefixStore(f"start {_restarts()}", store)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise RankLost(error) from error
    ranks = TorchRanks()
    try:
        yield ranks
    finally:
        if not ranks.lost:  # it would wait for a process that is gone
            dist.destroy_process_group()


def _take_gpu(number: int) -> None:
    """Let this process see its own GPU alone, as ``cuda``: threads would begin on the first one."""
    count = torch.cuda.device_count()
    if number >= count:
        raise UserError(
            f"torchrun has started more processes than there are GPUs ({count}): use --nproc_per_node "
            f"{count}, or --device cpu"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(map(str, range(count)))
    os.environ["CUDA_VISIBLE_DEVICES"] = names[number]
