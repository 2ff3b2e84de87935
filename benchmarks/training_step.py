"""Speed and peak memory of training steps, each in its own process, in turns.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/training_step.py peers --nanogpt nanoGPT
    python benchmarks/training_step.py precision
    python benchmarks/training_step.py allocator

``peers`` holds storylab beside nanoGPT's model, ``precision`` the emulated recipes beside bfloat16, and
``allocator`` the memory allocator as training sets it beside the C library's default.

storylab's 113M model and nanoGPT's 124M GPT-2 (its own model.py and optimizer, 12 layers, width 768,
50,257 ids, dropout 0) run the same step: micro-batches of 32 x 128 tokens, gradient clipping at 1.0, AdamW.
nanoGPT's train.py uses no autocast on a CPU, whatever --dtype says; it is timed as it is (float32) and with
bfloat16 autocast around its forward pass. The shapes differ, so tok/s is given beside FLOP/s counted as
6 x matrix parameters (blocks and head) + 12 x layers x width x length per token, the same way for both.
Runs take turns (A B C C B A ...); reported are medians of the per-process medians, and the ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SEQUENCES, LENGTH, VOCAB = 32, 128, 50257


def flops_per_token(matrix_parameters: int, layers: int, width: int) -> int:
    return 6 * matrix_parameters + 12 * layers * width * LENGTH


def storylab_step(dtype: str, keep_memory: bool = True) -> tuple[Callable[[], float], int]:
    import torch

    from storylab.config import preset_config
    from storylab.model.transformer import Transformer
    from storylab.precision.convert import quantize_blocks
    from storylab.training.allocator import keep_freed_memory
    from storylab.training.optimizers import build_optimizers
    from storylab.training.precision import choose_precision
    from storylab.training.step import training_step

    if keep_memory:
        keep_freed_memory()
    config = preset_config("113m")
    model = Transformer(config.model, VOCAB, seed=0)
    precision = choose_precision(torch.device("cpu"), dtype)  # type: ignore[arg-type]
    state = None
    if precision.recipe is not None:
        state = quantize_blocks(model.blocks, precision.recipe, seed=0, max_iters=1000)
    optimizers = build_optimizers(model, config)
    scaler = precision.grad_scaler()
    batch = torch.randint(VOCAB, (SEQUENCES, LENGTH + 1))
    iterations = itertools.count()

    def step() -> float:
        if state is not None:
            state.advance(next(iterations))
            state.weights_changed()
        return (
            training_step(
                model,
                optimizers,
                scaler,
                precision,
                batch,
                micro_batch=SEQUENCES,
                learning_rate=1e-4,
                grad_clip=1.0,
            )
            .read()
            .loss
        )

    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    return step, flops_per_token(matrices, config.model.n_layer, config.model.n_embd)


def nanogpt_step(folder: Path, autocast: bool) -> tuple[Callable[[], float], int]:
    sys.path.insert(0, str(folder))
    import torch
    from model import GPT, GPTConfig  # nanoGPT's own

    torch.manual_seed(0)
    shape = {"n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False}
    model = GPT(GPTConfig(block_size=LENGTH, vocab_size=VOCAB, **shape))
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.999), "cpu")
    batch = torch.randint(VOCAB, (SEQUENCES, LENGTH + 1))
    x, y = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    positions = model.transformer.wpe.weight.numel()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - positions
    return step, flops_per_token(matrices, 12, 768)


Maker = Callable[[Path], tuple[Callable[[], float], int]]
MAKERS: dict[str, Maker] = {
    "storylab bfloat16": lambda _: storylab_step("bfloat16"),
    "storylab float32": lambda _: storylab_step("float32"),
    "nanoGPT bfloat16 (autocast added)": lambda folder: nanogpt_step(folder, True),
    "nanoGPT float32 (as it is)": lambda folder: nanogpt_step(folder, False),
    **{
        f"storylab {name}, emulated": lambda _, name=name: storylab_step(name)
        for name in ("fp8", "fp8-current", "mxfp8", "nvfp4")
    },
    "storylab bfloat16, allocator by default": lambda _: storylab_step("bfloat16", False),
}
TABLES = {
    "peers": [name for name in MAKERS if "emulated" not in name and "allocator" not in name],
    "precision": ["storylab bfloat16", *(name for name in MAKERS if "emulated" in name)],
    "allocator": ["storylab bfloat16", "storylab bfloat16, allocator by default"],
}


def measure(name: str, nanogpt: Path, steps: int) -> dict[str, float]:
    step, flops = MAKERS[name](nanogpt)
    step()  # the first one allocates
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    tokens = SEQUENCES * LENGTH
    return {
        "tokens_per_second": tokens / median,
        "gflops": flops * tokens / median / 1e9,
        "peak_gb": peak / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--nanogpt", type=Path, default=Path("nanoGPT"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print("RESULT", json.dumps(measure(args.only, args.nanogpt, args.steps)))
        return
    names = TABLES[args.table]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(args.repeats):
        for name in names if turn % 2 == 0 else names[::-1]:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = next(line for line in out.splitlines() if line.startswith("RESULT "))
            results[name].append(json.loads(row.removeprefix("RESULT ")))
            print(f"turn {turn + 1}: {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    base = {k: _median(results[names[0]], k) for k in results[names[0]][0]}
    print("| model | tok/s (min to max) | GFLOP/s | peak memory | storylab's speed / memory |")
    print("| --- | --- | --- | --- | --- |")
    for name, rows in results.items():
        speeds = [row["tokens_per_second"] for row in rows]
        print(
            f"| {name} | {statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f}) "
            f"| {_median(rows, 'gflops'):.0f} | {_median(rows, 'peak_gb'):.2f} GB "
            f"| {base['tokens_per_second'] / statistics.median(speeds):.2f} x / "
            f"{base['peak_gb'] / _median(rows, 'peak_gb'):.0%} |"
        )


def _median(rows: list[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


if __name__ == "__main__":
    main()
