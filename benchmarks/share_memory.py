"""Memory of each process of a run, with whole weights (ddp) and with shares of them (fsdp).

    python benchmarks/share_memory.py --preset 50m --sizes 2

Takes steps of one and of two micro-batches for each process, of random tokens, on CPUs. Prints a line for
each way: the weights; the peak of resident memory after the steps of one and after those of two
micro-batches, and after rank 0 has gathered a checkpoint. All are those of rank 0, less its memory before.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys

import torch

from storylab.config.presets import preset_config
from storylab.training.parallel import joined
from storylab.training.precision import choose_precision
from storylab.training.state import TrainState
from storylab.training.telemetry import peak_memory_bytes

CPU = torch.device("cpu")
VOCABULARY = 1024
TOKENS = 64


def measure(args: argparse.Namespace) -> None:
    """Take the steps as one of the processes; the first one prints."""
    torch.set_num_threads(1)
    with joined("cpu", args.here) as ranks:
        before = peak_memory_bytes(CPU)
        config = dataclasses.replace(preset_config(args.preset), batch_size=1, compile=False)
        state = TrainState(config, VOCABULARY, choose_precision(CPU, "float32"))
        state.join(ranks)
        peaks = []
        for micro_batches in (1, 2):
            batch = torch.randint(VOCABULARY, (micro_batches * ranks.size, TOKENS + 1))
            for iteration in range(2):
                state.step(iteration, batch, 1e-3)
            peaks.append(peak_memory_bytes(CPU) - before)
        ranks.whole(state.tensors())
        peaks.append(peak_memory_bytes(CPU) - before)
        weights = 4 * sum(p.numel() for p in state.model.parameters())
        if ranks.leads:
            shown = " | ".join(f"{peak / 1e6:,.0f} MB" for peak in peaks)
            print(f"| {args.here} | {ranks.size} | {weights / 1e6:,.0f} MB | {shown} |", flush=True)


def main() -> None:
    """Measure every way with every number of processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="50m")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--here", choices=("ddp", "fsdp"), help="be one of the processes")
    args = parser.parse_args()
    if args.here:
        measure(args)
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for size in args.sizes:
        for way in ("ddp", "fsdp"):
            start = [*launcher, str(size), *sys.argv, "--here", way]
            subprocess.run(start, env=env, check=True)


if __name__ == "__main__":
    main()
