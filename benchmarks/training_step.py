"""Speed and peak memory of storylab's own training steps, each in its own process, in turns.

    python benchmarks/training_step.py precision
    python benchmarks/training_step.py allocator
    python benchmarks/training_step.py profile

``precision`` holds the emulated recipes beside bfloat16, ``allocator`` the memory allocator as training
sets it beside the C library's default, and ``profile`` compiled steps beside uncompiled ones, with the
share of the time that each part of a step takes, the share that its matrix products would take alone,
and how many times faster a token is evaluated than trained on.

The steps are those of the 113M model: a micro-batch of 32 x 128 random tokens of 50,257, gradient clipping
at 1.0, AdamW. Runs take turns (A B C C B A ...); reported are medians of the per-process medians, and the
ratios. benchmarks/peers.py has other programs beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from typing import Any

PRESET, SEQUENCES, VOCAB = "113m", 32, 50257
# dtype, compiled, and whether freed memory is kept.
Kind = tuple[str, bool, bool]
KINDS: dict[str, Kind] = {
    "bfloat16": ("bfloat16", False, True),
    "bfloat16, compiled": ("bfloat16", True, True),
    **{
        f"{name}, emulated": (name, False, True)
        for name in ("fp8", "fp8-current", "mxfp8", "nvfp4")
    },
    "bfloat16, allocator by default": ("bfloat16", False, False),
}
TABLES = {
    "precision": ["bfloat16", *(name for name in KINDS if "emulated" in name)],
    "allocator": ["bfloat16", "bfloat16, allocator by default"],
    "profile": ["bfloat16", "bfloat16, compiled"],
}


def measure(kind: Kind, steps: int, profile: bool) -> dict[str, Any]:
    from storylab.config import preset_config
    from storylab.model.flops import training_flops
    from storylab.training import measure as measuring

    dtype, compiled, keep_memory = kind
    if not keep_memory:
        measuring.keep_freed_memory = lambda: None
    config = preset_config(PRESET)
    config = dataclasses.replace(config, batch_size=SEQUENCES, dtype=dtype, compile=compiled)
    timer = measuring.StepTimer(config, VOCAB)
    median = timer.median(SEQUENCES, 0.0, steps)
    tokens = SEQUENCES * config.block_size
    found = {
        "tokens_per_second": tokens / median,
        "gflops": training_flops(config.model, VOCAB, config.block_size) * tokens / median / 1e9,
        "peak_gb": timer.memory() / 1e9,
    }
    if profile:
        alone = measuring.products_seconds(config, VOCAB, tokens, timer.precision)
        found |= timer.shares(SEQUENCES) | {"its matrix products alone": alone / median}
        found["evaluation, times faster"] = median / evaluation_seconds(timer)
    return found


def evaluation_seconds(timer: Any) -> float:
    """Seconds to evaluate as many tokens as a step trains on, as training evaluates: uncompiled."""
    import torch

    tokens = torch.randint(VOCAB, (SEQUENCES, timer.config.block_size))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        with torch.compiler.set_stance("force_eager"), timer.precision.autocast():
            timer.model.token_losses(tokens, tokens)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print("RESULT", json.dumps(measure(KINDS[args.only], args.steps, args.table == "profile")))
        return
    names = TABLES[args.table]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(args.repeats):
        for name in names if turn % 2 == 0 else names[::-1]:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = next(line for line in out.splitlines() if line.startswith("RESULT "))
            results[name].append(json.loads(row.removeprefix("RESULT ")))
            print(f"turn {turn + 1}: {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    base_keys = ("tokens_per_second", "gflops", "peak_gb")
    base = {k: _median(results[names[0]], k) for k in base_keys}
    print(
        "| step | tok/s (min to max) | GFLOP/s | peak memory | the first's speed / memory over its |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, rows in results.items():
        speeds = [row["tokens_per_second"] for row in rows]
        print(
            f"| {name} | {statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f}) "
            f"| {_median(rows, 'gflops'):.0f} | {_median(rows, 'peak_gb'):.2f} GB "
            f"| {base['tokens_per_second'] / statistics.median(speeds):.2f} x / "
            f"{base['peak_gb'] / _median(rows, 'peak_gb'):.0%} |"
        )

    shares = [k for k in next(iter(results.values()))[0] if k not in base_keys]
    if shares:
        print("\n| share of the time | " + " | ".join(names) + " |")
        print("| --- |" + " --- |" * len(names))
        for part in shares:
            form = "{:.1f}" if "times" in part else "{:.0%}"
            cells = [form.format(_median(results[name], part)) for name in names]
            print(f"| {part} | " + " | ".join(cells) + " |")


def _median(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


if __name__ == "__main__":
    main()
