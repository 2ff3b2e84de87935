"""Compare `storylab plan` with published training speeds.

    python benchmarks/plan_check.py

The constants of ``planning/roofline.py`` were chosen with these figures in view, so this shows that one
set of round constants fits all of them, not that it predicts others.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from storylab.config import ModelConfig, TrainConfig
from storylab.planning.gpus import GPUS
from storylab.planning.roofline import tokens_per_second
from storylab.planning.software import SOFTWARE, Software, Traffic
from storylab.precision.edit import find_recipe

RECORD = TrainConfig()
LONG = dataclasses.replace(RECORD, block_size=2048)
GPT2_SHAPE = ModelConfig(
    n_kv_head=12
)  # as many weights as GPT-2 small, whose two matrices are wider
# GPT-2's layer norm and GELU are one library kernel each, and it turns nothing.
GPT2_EAGER = dataclasses.replace(SOFTWARE["eager"], traffic=Traffic(28, 0, 15, 22, 34, 70, 40))


@dataclass(frozen=True)
class Published:
    """A training speed that someone has reported, in thousands of tokens a second."""

    what: str
    low: float
    high: float
    config: TrainConfig
    vocab_size: int
    card: str
    software: Software
    dtype: str = "bfloat16"

    @property
    def predicted(self) -> float:
        """Thousands of tokens a second, as the plan has it."""
        recipe = find_recipe(self.dtype)
        card = GPUS[self.card]
        return tokens_per_second(self.config, self.vocab_size, card, self.software, recipe) / 1e3

    @property
    def ratio(self) -> float:
        """Predicted over the nearest published figure."""
        return self.predicted / min(max(self.predicted, self.low), self.high)


PUBLISHED = [
    Published("the original log", 116, 116, RECORD, 50257, "rtx5090", SOFTWARE["eager"]),
    Published(
        "112M, same attention, length 2048, 49,152 ids, compiled",
        165,
        165,
        dataclasses.replace(LONG, batch_size=8),
        49152,
        "rtx5090",
        SOFTWARE["compiled"],
    ),
    Published(
        "the same, FP8",
        185,
        196,
        dataclasses.replace(LONG, batch_size=18),
        49152,
        "rtx5090",
        SOFTWARE["compiled"],
        "fp8",
    ),
    Published(
        "124M GPT-2, length 1024, hand-written kernels",
        207,
        207,
        dataclasses.replace(RECORD, block_size=1024, batch_size=16, model=GPT2_SHAPE),
        50257,
        "rtx5090",
        SOFTWARE["handwritten"],
    ),
    Published(
        "162M, untied, GPT-2's layers",
        98,
        98,
        dataclasses.replace(RECORD, model=GPT2_SHAPE),
        50257,
        "rtx4090",
        GPT2_EAGER,
    ),
    Published(
        "the same, FP8",
        105,
        110,
        dataclasses.replace(RECORD, model=GPT2_SHAPE),
        50257,
        "rtx4090",
        GPT2_EAGER,
        "fp8",
    ),
]


def main() -> None:
    """Print the table of docs/plan.md."""
    print("| run | card | published, k tok/s | predicted, k tok/s | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for row in PUBLISHED:
        span = f"{row.low:g}" + (f" to {row.high:g}" if row.high > row.low else "")
        print(
            f"| {row.what} | {GPUS[row.card].name} | {span} | {row.predicted:.0f} | {row.ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
