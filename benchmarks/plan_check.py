"""Compare `storylab plan` with published and measured training speeds.

    python benchmarks/plan_check.py             # both tables of docs/plan.md, fit and leave-one-out
    python benchmarks/plan_check.py --run       # the original log's run on an RTX 5090, part by part
    python benchmarks/plan_check.py --count     # bytes of the compiler's code for this package's model

Four shares of a GPU's limits are fitted to the six published figures of FITTED: those of products, of
bandwidth in unfused and in fused code, and the gap of a kernel. Every other number of a plan is counted
or comes from a sheet. TESTS are runs that the fit has not seen.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares

from storylab.config import ModelConfig, TrainConfig
from storylab.model.cost import StepPart
from storylab.planning.gpus import GPUS, Gpu
from storylab.planning.micro_batch import fitted
from storylab.planning.roofline import micro_batch_work, tokens_per_second, waiting_seconds
from storylab.planning.software import (
    BANDWIDTH,
    FUSED_BANDWIDTH,
    GAP,
    PRODUCTS,
    SOFTWARE,
    Software,
    Traffic,
)
from storylab.precision.edit import find_recipe

RECORD = TrainConfig()
VOCAB = 50257
LONG = replace(RECORD, block_size=2048)
# As many weights as GPT-2 small, whose two matrices are wider.
GPT2_SHAPE = ModelConfig(n_kv_head=12)
# GPT-2's layer norm and GELU are one library kernel each, and it turns nothing.
GPT2_TRAFFIC = Traffic(28, 0, 15, 22, 34, 24, 70, 40)
A100_40GB = replace(GPUS["a100"], name="A100 40 GB", bandwidth=1.555, memory=40)
# The published text gives 91M parameters, Llama's layers and 512 tokens. This is the only shape of GPT-2
# small's width and depth with a round vocabulary that has as many; its micro-batch is a guess.
LLAMA_91M = replace(RECORD, block_size=512, model=GPT2_SHAPE)

# Products, bandwidth, bandwidth of fused code, gap: the shares in use, then guesses from measured kernels
# with the trust in them. The guesses keep six figures from deciding four numbers alone.
Shares = Sequence[float]
IN_USE: Shares = (PRODUCTS, BANDWIDTH, FUSED_BANDWIDTH, GAP)
GUESSES, TRUST = (0.95, 0.85, 0.75, 3e-6), (0.1, 0.1, 0.15, 2e-6)
LEAST_SHARES, MOST_SHARES = (0.5, 0.4, 0.3, 0.0), (1.0, 1.0, 1.0, 1e-5)
# Error of a published figure, as a share of it.
FIGURE_ERROR = 0.05


@dataclass(frozen=True)
class Published:
    """A training speed that someone has reported, in thousands of tokens a second.

    Attributes:
        name: of the run.
        low, high: the reported speed, or a range of them.
        config: the run.
        vocab_size: number of token ids.
        gpu: the card.
        software: a kind of :data:`SOFTWARE`.
        dtype: precision.
        traffic: of its elementwise operations, where it is not that of the kind.
    """

    name: str
    low: float
    high: float
    config: TrainConfig
    vocab_size: int
    gpu: Gpu
    software: str
    dtype: str = "bfloat16"
    traffic: Traffic | None = None

    def software_with(self, shares: Shares = IN_USE) -> Software:
        """Its kind of software with these shares of the limits."""
        products, bandwidth, fused, gap = shares
        kind = SOFTWARE[self.software]
        return replace(
            kind,
            products=products,
            bandwidth=fused if self.software == "compiled" else bandwidth,
            gap=gap,
            traffic=self.traffic or kind.traffic,
        )

    def predicted(self, shares: Shares = IN_USE) -> float:
        """Thousands of tokens a second, as a plan with these shares has it."""
        recipe, software = find_recipe(self.dtype), self.software_with(shares)
        return tokens_per_second(self.config, self.vocab_size, self.gpu, software, recipe) / 1e3

    def ratio(self, shares: Shares = IN_USE) -> float:
        """Predicted over the nearest reported speed."""
        predicted = self.predicted(shares)
        return predicted / min(max(predicted, self.low), self.high)


def _record(sequences: int) -> TrainConfig:
    """The original log's run in micro-batches of this many sequences."""
    return replace(RECORD, batch_size=sequences, gradient_accumulation_steps=1024 // sequences)


RTX5090, RTX4090, H100 = GPUS["rtx5090"], GPUS["rtx4090"], GPUS["h100"]
GPT2_RUN = replace(RECORD, model=GPT2_SHAPE)
GPT2_LONG = replace(GPT2_RUN, block_size=1024, batch_size=16)
SHAPE_112M = "112M, same attention, length 2048, 49,152 ids, compiled"
FITTED = [
    Published("the original log", 116, 116, RECORD, VOCAB, RTX5090, "eager"),
    Published(SHAPE_112M, 165, 165, replace(LONG, batch_size=8), 49152, RTX5090, "compiled"),
    Published(
        "the same, FP8", 185, 196, replace(LONG, batch_size=18), 49152, RTX5090, "compiled", "fp8"
    ),
    Published(
        "124M GPT-2, length 1024, hand-written kernels",
        207,
        207,
        GPT2_LONG,
        VOCAB,
        RTX5090,
        "handwritten",
    ),
    Published(
        "162M, untied, GPT-2's layers",
        98,
        98,
        GPT2_RUN,
        VOCAB,
        RTX4090,
        "eager",
        traffic=GPT2_TRAFFIC,
    ),
    Published(
        "the same, FP8", 105, 110, GPT2_RUN, VOCAB, RTX4090, "eager", "fp8", traffic=GPT2_TRAFFIC
    ),
]
TESTS = [
    Published(
        "91M, Llama's layers, length 512, compiled",
        318,
        318,
        LLAMA_91M,
        8192,
        A100_40GB,
        "compiled",
    ),
    Published("this package, uncompiled", 227, 227, _record(64), VOCAB, H100, "eager"),
    *(
        Published(
            f"this package, compiled, micro-batches of {sequences}",
            speed,
            speed,
            _record(sequences),
            VOCAB,
            H100,
            "compiled",
        )
        for sequences, speed in ((64, 373), (256, 392), (512, 398))
    ),
]


def fit(rows: Sequence[Published]) -> Shares:
    """The shares with which these rows come out best, in relative error, close to the guesses."""

    def residuals(shares: Shares) -> list[float]:
        errors = [math.log(row.ratio(shares)) / FIGURE_ERROR for row in rows]
        return errors + [
            (share - guess) / trust
            for share, guess, trust in zip(shares, GUESSES, TRUST, strict=True)
        ]

    found = least_squares(
        residuals, GUESSES, bounds=(LEAST_SHARES, MOST_SHARES), x_scale=TRUST, diff_step=1e-4
    )
    return tuple(float(share) for share in found.x)


def held_out(rows: Sequence[Published]) -> list[float]:
    """Each row's predicted over published speed, with shares that are fitted to the other rows."""
    return [row.ratio(fit([*rows[:i], *rows[i + 1 :]])) for i, row in enumerate(rows)]


def _print_rows() -> None:
    print("| run | card | published, k tok/s | predicted, k tok/s | ratio | held out |")
    print("| --- | --- | --- | --- | --- | --- |")
    without = held_out(FITTED)
    for row, ratio in zip(FITTED, without, strict=True):
        print(f"{_cells(row)} {ratio:.2f} |")
    error = math.sqrt(float(np.mean([math.log(ratio) ** 2 for ratio in without])))
    print(f"\nheld-out error, root mean square: {error:.1%}")
    shares = fit(FITTED)
    print("fitted: " + ", ".join(f"{share:.3g}" for share in shares))
    print("in use: " + ", ".join(f"{share:.3g}" for share in IN_USE))
    print("\n| run, not fitted to | card | measured, k tok/s | predicted, k tok/s | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for row in TESTS:
        print(_cells(row))


def _cells(row: Published) -> str:
    span = f"{row.low:g}" + (f" to {row.high:g}" if row.high > row.low else "")
    return f"| {row.name} | {row.gpu.name} | {span} | {row.predicted():.0f} | {row.ratio():.2f} |"


def _print_run() -> None:
    """Minutes of the original log's run on an RTX 5090, by part: as it was done, and by this package."""
    by_memory = fitted(replace(RECORD, preset="113m"), RTX5090.memory * 1e9)
    columns = {
        "uncompiled": (RECORD, "eager"),
        "compiled": (RECORD, "compiled"),
        f"compiled, micro-batches of {by_memory.batch_size}": (by_memory, "compiled"),
    }
    minutes = {
        name: _minutes(config, SOFTWARE[kind], RTX5090) for name, (config, kind) in columns.items()
    }
    print("| minutes | " + " | ".join(columns) + " |")
    print("| --- " * (len(columns) + 1) + "|")
    parts = [part for part in StepPart if any(found[part] for found in minutes.values())]
    for part in [*parts, "waiting for the host"]:
        print(f"| {part} | " + " | ".join(f"{m[part]:.1f}" for m in minutes.values()) + " |")
    totals = [sum(found.values()) for found in minutes.values()]
    print("| all | " + " | ".join(f"{total:.1f}" for total in totals) + " |")
    cards = RTX5090.measured_cards()
    assert cards is not None
    spans = [
        [sum(_minutes(config, SOFTWARE[kind], card).values()) for card in reversed(cards)]
        for config, kind in columns.values()
    ]
    cells = " | ".join(f"{fast:.1f} to {slow:.1f}" for fast, slow in spans)
    print(f"| all, on the fastest to the slowest measured card | {cells} |")


def _minutes(config: TrainConfig, software: Software, gpu: Gpu) -> dict[str, float]:
    """Minutes of a run by part of its steps."""
    work = micro_batch_work(config, VOCAB, software)
    times: dict[str, float] = defaultdict(float)
    for each in work:
        times[each.part] += each.seconds(gpu, software)
    times["waiting for the host"] = waiting_seconds(work, gpu, software)
    batches = config.iterations * config.gradient_accumulation_steps
    return defaultdict(float, {part: batches * time / 60 for part, time in times.items()})


def main() -> None:
    """Print the tables of docs/plan.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--run", action="store_true", help="the original log's run by part")
    chosen.add_argument("--count", action="store_true", help="bytes of compiled code")
    args = parser.parse_args()
    if args.count:
        from fused_traffic import print_traffic

        print_traffic()
    elif args.run:
        _print_run()
    else:
        _print_rows()


if __name__ == "__main__":
    main()
