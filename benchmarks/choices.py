"""Time the alternatives behind three choices on this CPU: the head's loss, attention, and what to keep.

    python benchmarks/choices.py [--part head|attention|model]

Shapes are those of the 113M model at 32 x 128 tokens: head 768 to 50,257, attention 12 query and 3
key/value heads of 64, whole or in a window of 64, in bfloat16 under autocast, forward and backward;
"model" is the whole model at 32 or 8 x 128 tokens, redoing elementwise work in the backward pass (lean)
or keeping everything for it, or with the blocks' matrices in bfloat16 before it begins: the most that
casting weights once an iteration rather than once a micro-batch could bring. Every alternative runs in a
separate process, in turns (A B C C B A ...); reported are medians over processes, and peak memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

POSITIONS, WIDTH, VOCAB = 4096, 768, 50257
WINDOW = 64
ATTENTIONS = ("products", "flash", "window as a band", "window as a mask on products")


def head(kind: str) -> Callable[[], float]:
    import torch
    import torch.nn.functional as F

    from storylab.model import head as module
    from storylab.model.head import linear_cross_entropy

    if kind == "ours padded":  # as on a GPU
        padded = dataclasses.replace(
            module.CPU_CHUNKS, vocab_multiple=module.CUDA_CHUNKS.vocab_multiple
        )
        module.chunk_sizes = lambda device: padded
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator, requires_grad=True)
    weight = (torch.randn(VOCAB, WIDTH, generator=generator) * 0.02).requires_grad_()
    targets = torch.randint(VOCAB, (POSITIONS,), generator=generator)

    def ours() -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, targets) / POSITIONS

    def whole() -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    def torch_chunked() -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        low = hidden.bfloat16(), weight.bfloat16()
        return F.linear_cross_entropy(*low, targets, options=options)

    losses = {
        "ours": ours,
        "ours padded": ours,
        "all logits": whole,
        "torch chunked": torch_chunked,
    }

    def run() -> float:
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses[kind]()
        loss.backward()
        return loss.item()

    return run


def attention(kind: str, length: int) -> Callable[[], float]:
    import torch

    from storylab.config import Window
    from storylab.model import attention as module

    module.MAX_MATMUL_ATTENTION_LENGTH = 0 if "flash" in kind else 1 << 20
    shape = (POSITIONS // length, 12, length, 64)
    query = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    keys = (POSITIONS // length, 3, length, 64)
    key = torch.randn(keys, dtype=torch.bfloat16, requires_grad=True)
    value = torch.randn(keys, dtype=torch.bfloat16, requires_grad=True)

    window = Window(WINDOW)
    mask = module._mask(length, length, window, query.device)

    def attend() -> torch.Tensor:
        if kind == "window as a band":
            return module._banded_attention(query, key, value, window, WINDOW)
        if kind == "window as a mask on products":
            return module._matmul_attention(query, key, value, mask)
        return module.causal_attention(query, key, value)

    def run() -> float:
        out = attend()
        out.sum().backward()
        return out[0, 0, 0, 0].item()

    return run


def model(kind: str, sequences: int) -> Callable[[], float]:
    import torch

    from storylab.config import preset_config
    from storylab.model import recompute, transformer
    from storylab.training.precision import choose_precision

    if kind == "keep all":
        recompute.recomputes_activations = lambda x: False
    precision = choose_precision(torch.device("cpu"), "bfloat16")
    language_model = transformer.Transformer(preset_config("113m").model, VOCAB)
    if kind == "weights cast before":
        for weight, _ in language_model.block_matrices():
            weight.data = weight.data.bfloat16()
    windows = torch.randint(VOCAB, (sequences, 129))

    def run() -> float:
        language_model.zero_grad(set_to_none=True)
        with precision.autocast():
            loss = language_model(windows[:, :-1], windows[:, 1:])
        loss.backward()
        return loss.item()

    return run


def measure(name: str) -> dict[str, float]:
    part, kind, *size = name.split(":")
    if part == "head":
        run = head(kind)
    else:
        run = {"attention": attention, "model": model}[part](kind, int(size[0]))
    run()
    seconds, result = [], 0.0
    for _ in range(5):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    return {"ms": statistics.median(seconds) * 1e3, "peak_gb": peak / 1e9, "result": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=("head", "attention", "model"))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only)))
        return
    heads = [f"head:{kind}" for kind in ("ours", "ours padded", "all logits", "torch chunked")]
    lengths = (128, 256, 512, 1024)
    attentions = [f"attention:{kind}:{n}" for n in lengths for kind in ATTENTIONS]
    models = ["model:lean:32", "model:keep all:32", "model:weights cast before:32"]
    models += ["model:lean:8", "model:weights cast before:8"]
    names = [name for name in heads + attentions + models if name.startswith(args.part or "")]
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(args.repeats):
        for name in list(rows)[:: 1 if turn % 2 == 0 else -1]:
            command = [sys.executable, __file__, "--only", name]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            rows[name].append(json.loads(answer.stdout.splitlines()[-1]))
    print("| alternative | forward and backward | peak memory of the process | loss |")
    print("| --- | --- | --- | --- |")
    for name, measured in rows.items():
        ms = statistics.median(row["ms"] for row in measured)
        peak = statistics.median(row["peak_gb"] for row in measured)
        loss = f"{measured[0]['result']:.4f}" if name.startswith("head") else ""
        print(f"| {name.replace(':', ', ')} | {ms:.0f} ms | {peak:.2f} GB | {loss} |")


if __name__ == "__main__":
    main()
