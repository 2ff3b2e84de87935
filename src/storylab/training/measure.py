"""Training steps on random tokens, timed and profiled: for doctor, plans, calibrations and bench.

A profile cuts a step into the parts of :class:`StepPart`, as the plan does.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from storylab.config import TrainConfig
from storylab.model.cost import StepPart
from storylab.model.head import LinearCrossEntropy, padded_vocab_size
from storylab.precision.linear import ProductOperands, QuantizedProduct
from storylab.training.cores import considerate
from storylab.training.precision import ComputePolicy
from storylab.training.setup import resolve_device
from storylab.training.state import TrainState
from storylab.training.telemetry import peak_memory_bytes

# Rules that map profiler events to parts; the first match wins. A scope is an annotation or an autograd
# function that the event or one of its ancestors is named after.
SCOPE_RULES: dict[StepPart, tuple[str, ...]] = {
    StepPart.UPDATE: ("Optimizer.step", "Optimizer.zero_grad"),
    StepPart.HEAD: (LinearCrossEntropy.__name__,),
}
# An operation is the beginning of the name of the event or of one of its ancestors.
OP_RULES: dict[StepPart, tuple[str, ...]] = {
    StepPart.LINEAR: ("aten::mm", "aten::addmm", "aten::_scaled_mm"),
    StepPart.ATTENTION: (
        "aten::bmm",
        "aten::baddbmm",
        "aten::_softmax",
        "aten::_scaled_dot_product",
        "aten::_flash_attention",
        "triton_tem_fused_flex",
        "flex_attention",
        "torch_attn::",
    ),
    StepPart.UPDATE: ("aten::_foreach", "aten::linalg_vector_norm"),  # clipping
}
# Rules for events that match none of the above, the same two kinds.
FALLBACK_SCOPE_RULES: dict[StepPart, tuple[str, ...]] = {
    StepPart.QUANTIZING: (ProductOperands.__name__, QuantizedProduct.__name__)
}
FALLBACK_OP_RULES: dict[StepPart, tuple[str, ...]] = {StepPart.CASTS: ("aten::copy_",)}
# Products that a GPU is timed over.
IN_A_ROW = 20
# Steps that the host starts on a GPU before it waits for them; training runs ahead further still.
STEPS_IN_A_ROW = 5


@dataclass(frozen=True)
class Measured:
    """Cost of training steps.

    Attributes:
        micro_batch: seconds of a micro-batch.
        update: seconds of an update; 0 where an iteration is one micro-batch and they were timed as one.
        memory: peak, in bytes.
    """

    micro_batch: float
    update: float
    memory: float

    def seconds(self, config: TrainConfig) -> float:
        """Predicted seconds of training of a whole run, evaluations left out."""
        iteration = config.gradient_accumulation_steps * self.micro_batch + self.update
        return config.iterations * iteration


class StepTimer:
    """Times training steps on random tokens, of a model built as in training.

    Args:
        config: the run; its data, number of iterations and learning rates are not read.
        vocab_size: number of token ids.

    Raises:
        UserError: this machine lacks the device or the precision.
    """

    def __init__(self, config: TrainConfig, vocab_size: int) -> None:
        self.config, self.precision = resolve_device(config)
        self.device = self.precision.device
        self.vocab_size = vocab_size
        self.state = TrainState(self.config, vocab_size, self.precision)
        self.model = self.state.model

    def step(self, sequences: int, in_a_row: int = 1) -> float:
        """Seconds of a step over ``sequences`` windows, in micro-batches of the config's size: the mean of
        several, if ``in_a_row`` says so, without waiting for a GPU between them."""
        shape = (sequences, self.config.block_size + 1)
        batch = torch.randint(self.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        batch = batch.to(self.device)
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(in_a_row):
            self.state.step(0, batch, learning_rate=0.0)
        synchronize(self.device)
        return (time.perf_counter() - start) / in_a_row

    def times(self, sequences: int, seconds: float, least: int = 2) -> list[float]:
        """Seconds of each step, as many as fit into ``seconds`` and at least ``least``. On a GPU the
        steps of a row all count as their mean."""
        started = time.perf_counter()
        found: list[float] = []
        in_a_row = STEPS_IN_A_ROW if self.device.type == "cuda" else 1
        while len(found) < least or time.perf_counter() - started < seconds:
            found += [self.step(sequences, in_a_row)] * in_a_row
        return found

    def median(self, sequences: int, seconds: float, least: int = 2) -> float:
        """Median of :meth:`times` after a warm-up step. Threads wait for other programs as in training."""
        with considerate(self.device):
            self.step(sequences)
            return statistics.median(self.times(sequences, seconds, least))

    def measured(self, seconds: float, least: int) -> Measured:
        """Time a micro-batch and an update for about ``seconds``, at least ``least`` steps of each kind.

        Steps have one micro-batch. Where an iteration has several, steps of two are timed as well; the
        difference is a micro-batch. They also need more memory.
        """
        kinds = min(self.config.gradient_accumulation_steps, 2)
        one, *more = (
            self.median(count * self.config.batch_size, seconds / kinds, least)
            for count in range(1, kinds + 1)
        )
        if not more:
            return Measured(one, 0.0, self.memory())
        # Other work during the first may leave nothing to the second; an update may well be the longer.
        micro_batch = min(max(more[0] - one, one / 10), one)
        return Measured(micro_batch, one - micro_batch, self.memory())

    def memory(self) -> int:
        """Peak memory so far, in bytes: of a CUDA device, else resident in this process."""
        return peak_memory_bytes(self.device)

    def shares(self, sequences: int) -> dict[StepPart, float]:
        """Share of a step's time that each part takes, see :meth:`part_seconds`."""
        return shares_of(self.part_seconds(sequences))

    def part_seconds(self, sequences: int) -> dict[StepPart, float]:
        """Seconds of each part of a step by torch's profiler: of the GPU's own work, or of the CPU's.

        Low precision has to be emulated: the rules do not know the operations of other libraries.
        """
        cuda = self.device.type == "cuda"
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
        with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
            self.step(sequences)
        times: dict[StepPart, float] = defaultdict(float)
        for event in profile.events() or ():
            # A kernel's time is its operation's already.
            if event.device_type.name != "CPU":
                continue
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            times[part_of(event)] += own / 1e6
        return {part: times[part] for part in StepPart}


def shares_of(seconds: dict[StepPart, float]) -> dict[StepPart, float]:
    """The parts of a step as shares of their sum."""
    total = sum(seconds.values())
    return {part: each / total for part, each in seconds.items()}


def part_of(event: Any) -> StepPart:
    """The part of a step that an event of torch's profiler belongs to."""
    names = []
    above = event
    while above is not None:
        names.append(above.name)
        above = above.cpu_parent
    for scopes, operations in (
        (SCOPE_RULES, OP_RULES),
        (FALLBACK_SCOPE_RULES, FALLBACK_OP_RULES),
    ):
        for part, scope_names in scopes.items():
            if any(scope in name for name in names for scope in scope_names):
                return part
        for part, prefixes in operations.items():
            if any(name.startswith(prefixes) for name in names):
                return part
    return StepPart.ELEMENTWISE


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(rows: int, inner: int, columns: int, precision: ComputePolicy) -> float:
    """FLOP/s of ``[rows, inner] @ [inner, columns]`` alone, the best of several."""
    a = torch.randn(rows, inner, device=precision.device, dtype=precision.dtype)
    b = torch.randn(columns, inner, device=precision.device, dtype=precision.dtype)
    out = a.new_empty(rows, columns)  # new memory at every product would be timed with it

    def multiply() -> None:
        torch.mm(a, b.T, out=out)

    device = precision.device
    cuda = device.type == "cuda"
    best = min(
        _device_seconds(multiply, device) if cuda else _host_seconds(multiply) for _ in range(5)
    )
    return 2 * rows * inner * columns / best


def _host_seconds(work: Callable[[], None]) -> float:
    """Seconds of ``work`` by the host's clock."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _device_seconds(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of ``work`` on a CUDA device by its own clock, the mean of :data:`IN_A_ROW`. The host's clock
    would mostly measure the launch and the wait of a single product."""
    stream = torch.cuda.current_stream(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    for _ in range(IN_A_ROW):
        work()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / IN_A_ROW


def products_seconds(
    config: TrainConfig, vocab_size: int, tokens: int, precision: ComputePolicy
) -> float:
    """Seconds of the matrix products of a step over ``tokens`` if each ran alone and everything else were
    free. Attention's products are left out; the vocabulary is padded as in training."""
    model = config.model

    def seconds(rows: int, inner: int, columns: int) -> float:
        shapes = [(rows, inner, columns), (rows, columns, inner), (columns, rows, inner)]
        flops = 2 * rows * inner * columns
        return sum(flops / product_rate(*shape, precision) for shape in shapes)

    blocks = sum(seconds(tokens, matrix.n_in, matrix.n_out) for matrix in model.matrices())
    return model.n_layer * blocks + seconds(
        tokens, model.n_embd, padded_vocab_size(vocab_size, precision.device)
    )
