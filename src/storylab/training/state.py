"""Everything that one optimizer step reads or updates. Shared by runs, planner and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from storylab.config import TrainConfig
from storylab.model.transformer import Transformer
from storylab.optim.build import build_optimizers
from storylab.optim.ema import WeightAverage
from storylab.optim.orthogonal import Muon
from storylab.precision.convert import quantize_blocks
from storylab.precision.linear import QuantizedLinear
from storylab.record import checkpoint
from storylab.training.allocator import keep_freed_memory
from storylab.training.precision import ComputePolicy, require_same_bits
from storylab.training.ranks import ONE_PROCESS, Ranks
from storylab.training.step import DeviceStepMetrics, training_step


class TrainState:
    """Model, quantization state, optimizers, loss scaler and average of the weights of a new run.

    Args:
        config: the run, with device and compiling filled in.
        vocab_size: number of token ids.
        precision: the config's.
    """

    def __init__(self, config: TrainConfig, vocab_size: int, precision: ComputePolicy) -> None:
        self.config, self.precision = config, precision
        if precision.device.type == "cpu":
            keep_freed_memory()
        require_same_bits(precision.device, config.block_size, config.model.head_size)
        self.model = Transformer(config.model, vocab_size, config.seed).to(precision.device)
        self.quantization = None
        if precision.recipe is not None:
            self.quantization = quantize_blocks(
                self.model.blocks,
                precision.recipe,
                config.seed,
                config.max_iters,
                precision.hardware,
            )
        if config.compile:
            self.model.compile_blocks()
        self.scaler = precision.grad_scaler()
        self.ranks = ONE_PROCESS
        self._follow_model()

    def _follow_model(self) -> None:
        """Make the optimizers and the average of the model's present parameters."""
        self.optimizers = build_optimizers(self.model, self.config)
        self.ema = WeightAverage(self.model, self.config.ema_fraction * self.config.iterations)

    def join(self, ranks: Ranks) -> None:
        """Divide every step from now on between the processes of a run."""
        self.ranks = ranks
        before = self.tensors()
        if ranks.follow(self.model):
            self._follow_model()
            self.restore(before)
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.divide, optimizer.by_matrix = ranks.divide, ranks.by_matrix
        if self.quantization is not None:
            self.quantization.first_draw, self.quantization.draw_step = ranks.rank, ranks.size

    def step(
        self,
        iteration: int,
        batch: Tensor,
        learning_rate: float,
        between: Callable[[], None] = lambda: None,
    ) -> DeviceStepMetrics:
        """Train on ``batch [S, T + 1]`` (int64) as in ``iteration``, in micro-batches of the config's size.

        ``between`` is called where it may raise to leave.

        Raises:
            NonFiniteError: see :func:`training_step`.
        """
        if self.quantization is not None:
            self.quantization.advance(iteration)
        result = training_step(
            self.model,
            self.optimizers,
            self.scaler,
            self.precision,
            batch,
            micro_batch=self.config.batch_size,
            learning_rate=learning_rate,
            grad_clip=self.config.grad_clip,
            skips=self.config.on_divergence == "skip",
            between=between,
            ranks=self.ranks,
        )
        self.ranks.largest(self._amaxes())
        if self.quantization is not None:
            self.quantization.weights_changed()
        self.ema.update(self.model, iteration)
        return result

    def _amaxes(self) -> list[Tensor]:
        """The largest magnitudes that delayed scales have noted in this iteration, each ``[3]``."""
        return [
            layer.amax_history[:, 0]
            for layer in self.model.modules()
            if isinstance(layer, QuantizedLinear) and layer.recipe.delayed
        ]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Temporarily swap in the averaged weights, if there are any. Methods of the model can be called
        inside, on all ranks together."""
        self._exchange()
        try:
            with self.ranks.gathered(self.model):
                yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        if self.ema.exchange(self.model) and self.quantization is not None:
            self.quantization.weights_changed()

    def tensors(self) -> dict[str, Tensor]:
        """Weights, their average and the optimizers' state, by the names that a checkpoint has."""
        return checkpoint.training_tensors(self.model, self.optimizers, self.ema.tensors)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load :meth:`tensors`.

        Raises:
            UserError: they do not fit this model or these optimizers.
        """
        for optimizer in self.optimizers:
            optimizer.state.clear()  # of steps after those tensors
        shares = self.ranks.shares(tensors)
        checkpoint.restore(self.model, self.optimizers, self.ema.tensors, shares)
        if self.quantization is not None:
            self.quantization.weights_changed()
