"""What graphics cards can do at most; a card is one entry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A card's limits. Rates are dense, with float32 accumulation: published ones are often with zeros
    skipped or with float16 accumulation, twice or four times these.

    Attributes:
        capability: CUDA's compute capability, which says what it can train in.
        bfloat16, fp8, fp4: matrix products, TFLOP/s; None where the card has none.
        bandwidth: of its memory, TB/s.
        memory: GB.
        watts: rated power.
    """

    name: str
    capability: tuple[int, int]
    bfloat16: float
    fp8: float | None
    fp4: float | None
    bandwidth: float
    memory: float
    watts: float

    def tflops(self, form: str) -> float | None:
        """Peak rate of products in ``form``."""
        rates = {"bfloat16": self.bfloat16, "fp8": self.fp8, "fp4": self.fp4}
        return rates[form]


CARDS: dict[str, Card] = {
    "rtx4090": Card("RTX 4090", (8, 9), 165.2, 330.3, None, 1.008, 24, 450),
    "rtx5090": Card("RTX 5090", (12, 0), 209.5, 419.0, 1676.0, 1.792, 32, 575),
    "a100": Card("A100 SXM", (8, 0), 312.0, None, None, 2.04, 80, 400),
    "h100": Card("H100 SXM", (9, 0), 989.0, 1979.0, None, 3.35, 80, 700),
    "h200": Card("H200", (9, 0), 989.0, 1979.0, None, 4.8, 141, 700),
    "b200": Card("B200", (10, 0), 2250.0, 4500.0, 9000.0, 7.7, 180, 1000),
}
