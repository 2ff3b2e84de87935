"""State that the quantized layers of a model share, and the events by which they are observed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from storylab.precision.quantize import Quantized
from storylab.precision.recipes import Operand


class QuantizationEvent(NamedTuple):
    """A tensor that training has just quantized.

    Attributes:
        layer: name of the layer.
        kind: input, weight or gradient.
        use: the product that reads it.
        values: ``[M, K]`` before quantization.
        operand: how it was quantized.
        quantized: the result.
    """

    layer: str
    kind: str
    use: str
    values: Tensor
    operand: Operand
    quantized: Quantized


@dataclass
class QuantizationState:
    """State that the quantized layers of a model share: the iteration, and whether they quantize."""

    seed: int
    max_iters: int
    enabled: bool = True
    iteration: int = 0
    weights_version: int = 0
    """Counts up whenever the weights may have changed."""
    draws: dict[str, int] = field(default_factory=dict)
    first_draw: int = 0
    draw_step: int = 1
    """The draws of this process: those of every ``draw_step``-th micro-batch, from ``first_draw`` on."""
    on_quantize: Callable[[QuantizationEvent], None] | None = None
    """Optional callback, invoked for each tensor quantized in a training pass."""

    def advance(self, iteration: int) -> None:
        """Go to ``iteration``; its random draws do not depend on earlier ones."""
        self.iteration = iteration
        self.draws.clear()

    def weights_changed(self) -> None:
        """Invalidate cached quantized weights."""
        self.weights_version += 1

    def past(self, share: float) -> bool:
        """Whether more than this share of the iterations is done."""
        return self.iteration > share * self.max_iters

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the layers compute without quantization while the block runs."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    @contextmanager
    def observed(self, callback: Callable[[QuantizationEvent], None]) -> Iterator[None]:
        """Call ``callback`` for every tensor that training quantizes while the block runs."""
        self.on_quantize = callback
        try:
            yield
        finally:
            self.on_quantize = None

    def draw_seed(self, name: str, shared: bool = False) -> int:
        """Seed of the next draw called ``name`` in this iteration, below 2^56; ``shared`` ones are not of a
        micro-batch."""
        count = self.draws[name] = self.draws.get(name, -1) + 1
        place = count if shared else self.first_draw + count * self.draw_step
        text = f"{self.seed} {self.iteration} {name} {place}"
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:7], "little")
