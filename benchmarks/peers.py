"""Compare storylab with the programs that people train small language models with, on this machine's CPU.

    git clone https://github.com/karpathy/llama2.c && git clone https://github.com/karpathy/nanoGPT
    pip install litgpt accelerate
    python benchmarks/peers.py same --preset 113m --data_dir data/tinystories-gpt2
    python benchmarks/peers.py best --preset 10m --data_dir data/files-bpe4096 --seconds 120

``same`` is the same arithmetic: shape, initial weights, batches of real stories, AdamW, clipping. Every
program takes ``--steps`` steps in a separate process, the programs in turns (A B C C B A ...); their
losses must agree before speed counts. ``best`` gives each program the same wall time, importing, starting
and compiling included, and judges by bits per byte of the validation stories. Its warm-up and its fall to
zero follow the clock; --learning_rate and --warmup are of AdamW in every program.

peer_programs.py says how each is built; ``Trainer`` is the one of transformers, whole. nanoGPT and
llama2.c use no autocast on a CPU, whatever --dtype says: they are timed as they are (float32) and with
bfloat16 autocast put around their forward pass. nanoGPT's shape is GPT-2's, with as many layers of the
same width, so compare its FLOP/s, counted in one way for all: 6 x matrix parameters (blocks and head)
+ 12 x layers x width x length a token. Programs that are not installed are left out, with a line. With
``--empty_cache`` every process compiles again.

One more step of ``same`` is profiled for the share of its matrix products, attention kernels counted whole.
What is left is work that matrix units such as AMX do not speed up, and from it comes a prediction: the
ratio of speeds where bfloat16's products took a quarter of their time, and float32's what they take.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_programs import LENGTH, PROGRAMS, installed, start, trainer_times

STARTED = time.perf_counter()
TOKENS = 100_000
# Operations that are matrix products, by how their names begin.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product")
FASTER_PRODUCTS = 4
# Programs of one shape whose losses are further apart than this do not compute the same.
SAME_LOSS = 0.01


def batches_of(args: argparse.Namespace) -> Any:
    from storylab.data.batches import TrainingBatches
    from storylab.data.dataset import load_dataset

    dataset = load_dataset(args.data_dir)
    args.vocab_size = dataset.vocab_size
    make = TrainingBatches(dataset.splits["train"], dataset.fingerprint, 1, LENGTH, args.sequences)
    return dataset, make


def measure_same(name: str, args: argparse.Namespace) -> dict[str, float]:
    """One program's steps: median seconds without the first, its cost, memory and last loss."""
    import torch

    from storylab.training.telemetry import peak_memory_bytes

    _, make = batches_of(args)
    batches = [make(i) for i in range(args.steps)]
    if name.startswith("transformers Trainer"):
        times, losses, model = trainer_times(args, batches, True)
        peak, products = peak_memory_bytes(torch.device("cpu")), math.nan
    else:
        program = PROGRAMS[name](args)
        model = program.model
        times, losses = [], []
        for batch in batches:
            begin = time.perf_counter()
            losses.append(program.step(batch, args.learning_rate))
            times.append(time.perf_counter() - begin)
        peak = peak_memory_bytes(torch.device("cpu"))  # before the profiler takes its own
        products = product_share(lambda: program.step(batches[-1], args.learning_rate))
    median = statistics.median(times[1:])
    shape, _ = start(args)
    positions = sum(p.numel() for n, p in model.named_parameters() if "wpe" in n)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - positions
    flops = 6 * matrices + 12 * shape.n_layer * shape.n_embd * LENGTH
    tokens = args.sequences * LENGTH
    return {
        "tokens_per_second": tokens / median,
        "gflops": flops * tokens / median / 1e9,
        "peak_gb": peak / 1e9,
        "step_seconds": median,
        "product_share": products,
        "start_seconds": times[0] - median,
        "loss": losses[-1],
    }


def product_share(step: Callable[[], object]) -> float:
    """Share of the time of ``step`` that matrix products take, by torch's profiler."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        begin = time.perf_counter()
        step()
        seconds = time.perf_counter() - begin
    events = [event for event in profile.events() or () if event.name.startswith(PRODUCTS)]
    return sum(event.self_cpu_time_total for event in events) / 1e6 / seconds


def measure_best(name: str, args: argparse.Namespace) -> dict[str, float]:
    """One program trained for the given wall time; its learning rate falls to zero at the end of it."""
    import torch

    from storylab.training.evaluation import evaluate_split
    from storylab.training.precision import ComputePolicy

    dataset, make = batches_of(args)
    program = PROGRAMS[name](args)
    peak = getattr(program, "peak", args.learning_rate)
    warmup = getattr(program, "warmup", args.warmup)
    count = 0
    while (progress := (time.perf_counter() - STARTED) / args.seconds) < 1:
        rising = progress / warmup if warmup else 1.0
        share = min(rising, (1 - progress) / (1 - warmup))
        program.step(make(count), peak * share)
        count += 1
    seconds = time.perf_counter() - STARTED
    precision = ComputePolicy(torch.device("cpu"), torch.float32)
    found = evaluate_split(program, dataset.splits["validation"], LENGTH, precision)  # type: ignore[arg-type]
    return {
        "bits_per_byte": found.bits_per_byte,
        "loss": found.loss,
        "tokens": count * args.sequences * LENGTH,
        "seconds": seconds,
    }


MEASURES = {"same": measure_same, "best": measure_best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=MEASURES)
    parser.add_argument("--preset", default="113m")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--llama2c", type=Path, default=Path("llama2.c"))
    parser.add_argument("--nanogpt", type=Path, default=Path("nanoGPT"))
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--warmup", type=float, default=0.1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--programs", nargs="*", default=list(PROGRAMS))
    parser.add_argument("--empty_cache", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print("RESULT", json.dumps(MEASURES[args.table](args.only, args)))
        return
    names = []
    for name in args.programs:
        if installed(name, args):
            names.append(name)
        else:
            print(f"left out, not installed: {name}", file=sys.stderr)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(args.repeats):
        for name in names if turn % 2 == 0 else names[::-1]:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            environment = dict(os.environ)
            if args.empty_cache:
                environment["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            rows = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not rows:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"turn {turn + 1}: {name} failed: {last}", file=sys.stderr, flush=True)
                continue
            results[name].append(json.loads(rows[0].removeprefix("RESULT ")))
            print(f"turn {turn + 1}: {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    (print_same if args.table == "same" else print_best)(results, args)


def median(rows: list[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows) if rows else math.nan


def print_same(results: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    first, base = next(iter(results.items()))
    rate, loss = median(base, "gflops"), median(base, "loss")
    print(
        f"| {args.preset}, {args.sequences} x {LENGTH} tokens | tok/s (min to max) | GFLOP/s | first "
        f"step more | {TOKENS:,} tokens, first step included | peak memory | loss {args.steps} "
        "| speed per FLOP, first row's / its | outside of products, s a step "
        f"| predicted with bfloat16 products {FASTER_PRODUCTS} times as fast |"
    )
    print("| --- |" + " --- |" * 9)
    for name, rows in results.items():
        if not rows:
            print(f"| {name} | failed | | | | | | | | |")
            continue
        speeds = [row["tokens_per_second"] for row in rows]
        ratio = f"{rate / median(rows, 'gflops'):.2f}"
        products = median(rows, "product_share")
        outside, predicted = "not profiled", "not profiled"
        if not math.isnan(products):
            outside = f"{median(rows, 'step_seconds') * (1 - products):.2f}"
            predicted = f"{predicted_rate(first, base) / predicted_rate(name, rows):.2f}"
        if "nanoGPT" not in name and abs(median(rows, "loss") - loss) > SAME_LOSS:
            ratio = predicted = "not the same arithmetic"
        whole = [row["start_seconds"] + TOKENS / row["tokens_per_second"] for row in rows]
        print(
            f"| {name} | {statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f}) "
            f"| {median(rows, 'gflops'):,.0f} | {median(rows, 'start_seconds'):.1f} s "
            f"| {statistics.median(whole):.0f} s "
            f"| {median(rows, 'peak_gb'):.2f} GB | {median(rows, 'loss'):.4f} "
            f"| {ratio} | {outside} | {predicted} |"
        )


def predicted_rate(name: str, rows: list[dict[str, float]]) -> float:
    """FLOP/s of a program where bfloat16's products were as many times faster as the table says."""
    products = median(rows, "product_share")
    faster = 1 if "float32" in name else FASTER_PRODUCTS
    return median(rows, "gflops") / (1 - products + products / faster)


def print_best(results: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    print(
        f"| {args.preset}, {args.seconds:g} s | tokens | loss, nats a token "
        "| bits per byte (min to max) |"
    )
    print("| --- | --- | --- | --- |")
    for name, rows in results.items():
        bits = [row["bits_per_byte"] for row in rows] or [math.nan]
        print(
            f"| {name} | {median(rows, 'tokens'):,.0f} | {median(rows, 'loss'):.4f} "
            f"| {statistics.median(bits):.3f} ({min(bits):.3f} to {max(bits):.3f}) |"
        )


if __name__ == "__main__":
    main()
