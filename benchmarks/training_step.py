"""Speed and peak memory of storylab's own training steps, each in its own process, in turns.

    python benchmarks/training_step.py precision
    python benchmarks/training_step.py allocator
    python benchmarks/training_step.py compiling
    python benchmarks/training_step.py keeping
    python benchmarks/training_step.py profile

``precision`` compares the emulated recipes with bfloat16. ``allocator`` compares the memory allocator as
training sets it with the C library's default and with huge pages. ``compiling`` measures the cost of the
first step with a filled and with an empty cache of compiled code. ``keeping`` measures the memory of blocks
that redo elementwise work in the backward pass and of blocks that keep everything. ``profile`` compares
compiled steps with uncompiled ones: the share of the time that each part of a step takes, the share that
its matrix products would take alone, and how many times faster a token is evaluated than trained on.

The steps are those of the 113M model: a micro-batch of 32 x 128 random tokens of 50,257, gradient clipping
at 1.0, AdamW. Runs take turns (A B C C B A ...); reported are medians of the per-process medians, and the
ratios. benchmarks/peers.py compares storylab with other programs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from storylab.config import Dtype

PRESET, SEQUENCES, VOCAB = "113m", 32, 50257


class Kind(NamedTuple):
    """The step that one process measures."""

    dtype: Dtype = "bfloat16"
    compiled: bool = False
    keep_memory: bool = True
    huge_pages: bool = False
    empty_cache: bool = False
    redo: bool = True

    def environment(self) -> dict[str, str]:
        """Variables that its process needs from its start."""
        found = dict(os.environ)
        if self.huge_pages:  # glibc's own switch: madvise(MADV_HUGEPAGE) for what malloc maps
            found["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        if self.empty_cache:
            found["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
        return found


KINDS = {
    "bfloat16": Kind(),
    "bfloat16, compiled": Kind(compiled=True),
    "bfloat16, compiled, empty cache": Kind(compiled=True, empty_cache=True),
    "bfloat16, keeping all": Kind(redo=False),
    "bfloat16, compiled, keeping all": Kind(compiled=True, redo=False),
    **{f"{name}, emulated": Kind(name) for name in ("fp8", "fp8-current", "mxfp8", "nvfp4")},
    "bfloat16, allocator by default": Kind(keep_memory=False),
    "bfloat16, huge pages": Kind(huge_pages=True),
}
TABLES = {
    "precision": ["bfloat16", *(name for name in KINDS if "emulated" in name)],
    "allocator": ["bfloat16", "bfloat16, allocator by default", "bfloat16, huge pages"],
    "compiling": ["bfloat16", "bfloat16, compiled", "bfloat16, compiled, empty cache"],
    "keeping": [
        "bfloat16, compiled, keeping all",
        "bfloat16, compiled",
        "bfloat16",
        "bfloat16, keeping all",
    ],
    "profile": ["bfloat16", "bfloat16, compiled"],
}


def measure(kind: Kind, steps: int, profile: bool) -> dict[str, Any]:
    from storylab.config import preset_config
    from storylab.model import recompute
    from storylab.model.cost import training_flops
    from storylab.training import measure as measuring
    from storylab.training import state

    if not kind.keep_memory:
        state.keep_freed_memory = lambda: None  # type: ignore[attr-defined]
    if not kind.redo:
        recompute.recomputes_activations = lambda x: False
    config = preset_config(PRESET)
    config = dataclasses.replace(
        config, batch_size=SEQUENCES, dtype=kind.dtype, compile=kind.compiled
    )
    timer = measuring.StepTimer(config, VOCAB)
    first = timer.step(SEQUENCES)
    median = statistics.median(timer.times(SEQUENCES, 0.0, steps))
    tokens = SEQUENCES * config.block_size
    found = {
        "tokens_per_second": tokens / median,
        "gflops": training_flops(config.model, VOCAB, config.block_size) * tokens / median / 1e9,
        "peak_gb": timer.memory() / 1e9,
        "first_seconds": first - median,
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
            done = subprocess.run(
                command, env=KINDS[name].environment(), check=True, capture_output=True, text=True
            )
            row = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
            results[name].append(json.loads(row.removeprefix("RESULT ")))
            print(f"turn {turn + 1}: {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    base_keys = ("tokens_per_second", "gflops", "peak_gb", "first_seconds")
    base = {k: _median(results[names[0]], k) for k in base_keys}
    print(
        "| step | tok/s (min to max) | GFLOP/s | first step more | peak memory "
        "| the first's speed / memory over its |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, rows in results.items():
        speeds = [row["tokens_per_second"] for row in rows]
        print(
            f"| {name} | {statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f}) "
            f"| {_median(rows, 'gflops'):.0f} | {_median(rows, 'first_seconds'):.1f} s "
            f"| {_median(rows, 'peak_gb'):.2f} GB "
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
