"""The processes (ranks) of one run as the rest of the training sees them; one process takes all the work.
:mod:`storylab.training.parallel` joins several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from storylab.config import TrainConfig
from storylab.locks import exclusive
from storylab.record.folder import RunFolder
from storylab.training.precision import ComputePolicy

T = TypeVar("T")


class Ranks:
    """The processes of a run. This class is a run of one process: it takes all the work.

    Every method but ``leads`` must be called by all ranks, in the same order.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def require(self, config: TrainConfig, precision: ComputePolicy) -> None:
        """Raise a UserError where a run cannot be divided between so many processes."""

    def require_same(self, words: Callable[[], str]) -> None:
        """Raise a UserError unless ``words`` says the same on all ranks."""

    def follow(self, model: nn.Module) -> bool:
        """Prepare to sum the gradients of ``model``. Returns whether its parameters have been replaced, by
        ones that hold this rank's share of the weights."""
        return False

    def shares(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's shares of whole ``tensors``: of those that belong to a divided weight."""
        return dict(tensors)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of which the ranks may hold shares, for rank 0 to write; others may get none."""
        return dict(tensors)

    def gathered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context in which the methods of ``model`` can be called without a gradient. Its weights must not
        change inside."""
        return nullcontext()

    def micro_batches(
        self, parts: Sequence[Tensor], between: Callable[[], None]
    ) -> Iterator[Tensor]:
        """This rank's micro-batches of an iteration. ``between`` is called where the iteration may be left,
        equally often on all ranks: before each of them, or before the first of several processes' own."""
        for part in parts:
            between()
            yield part

    def sum_gradients(self, model: nn.Module, loss: Tensor) -> Tensor:
        """Sum the gradients of ``model`` in place, and the scalar ``loss``, which is returned."""
        return loss

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale the summed gradients of ``model`` to a global norm of at most ``max_norm``, in place;
        returns the norm before, a scalar."""
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def turns(self, items: Sequence[T], before: Callable[[T], None]) -> Iterator[T]:
        """This rank's items. ``before`` is called before each, equally often on all ranks."""
        for item in items:
            before(item)
            yield item

    def divide(self, work: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
        """``work(stack)``, of which each rank does a share of the first dimension. The result has the shape
        of ``stack``, in bfloat16."""
        return work(stack)

    def by_matrix(
        self, matrices: dict[Tensor, tuple[Tensor, ...]]
    ) -> AbstractContextManager[dict[Tensor, tuple[Tensor, ...]]]:
        """Context with whole matrices for this rank to update in place.

        Args:
            matrices: for each parameter tensors with as many rows, of which this rank may hold a share.
                The first one is only read.
        """
        return nullcontext(matrices)

    def add(self, tensor: Tensor) -> None:
        """Sum a tensor over the ranks in place."""

    def largest(self, tensors: Sequence[Tensor]) -> None:
        """Replace every element of ``tensors`` of one shape by its largest value on any rank."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum over the ranks of each value."""
        return list(values)

    def highest(self, value: int) -> int:
        """The largest ``value`` of any rank."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any rank."""
        return bool(self.highest(flag))

    def text(self, text: str) -> str:
        """The text that rank 0 has."""
        return text

    def folder(self, folder: Path) -> RunFolder:
        """The run folder; on other ranks than 0 one that writes nothing."""
        return RunFolder(folder)

    def hold(self, folder: Path) -> AbstractContextManager[None]:
        """Context that holds ``folder`` for this run, see :func:`storylab.locks.exclusive`."""
        return exclusive(folder)


ONE_PROCESS = Ranks()
