"""One run on 1, 2 and 4 processes of this machine: losses, speed, memory and bytes exchanged.

    python benchmarks/world_sizes.py --data data/builtin-bpe1024 --out world-sizes

Prints the table of docs/guide/machines.md. The processes share this machine's cores, one thread each: with
fewer cores than processes, the speeds show the cost of more processes and no gain.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from storylab.config.presets import preset_config
from storylab.record.folder import RunFolder
from storylab.record.schema import IterationRow
from storylab.training.observers import Observer
from storylab.training.parallel import joined
from storylab.training.train import train

SIZES = (1, 2, 4)
OPTIMIZERS = ("adamw", "normuon")
QUESTIONS = 300
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
    "batch_size": 1,
    "gradient_accumulation_steps": 4,
    "block_size": 64,
    "learning_rate": 3e-3,
    "warmup_iters": 5,
    "eval_iters": 1,
    "log_interval": 10,
}


class BeforeEvaluation(Observer):
    """Keeps the counts of all iterations but the last one, which an evaluation precedes."""

    def __init__(self, count: dict[str, int]) -> None:
        self.count, self.snapshot = count, dict(count)

    def progress(self, name: str, done: int, total: int) -> None:
        """See :class:`Observer`."""
        if name == "training" and done == total - 1:
            self.snapshot = dict(self.count)


def train_here(args: argparse.Namespace) -> None:
    """Train with every optimizer as one of the processes; the first one writes what it has counted."""
    torch.set_num_threads(1)
    count = {"bytes": 0, "calls": 0}

    def counting(collective: Any) -> Any:
        def counted(first: torch.Tensor, *others: Any, **options: Any) -> Any:
            # The gathered matrices, or the sum; those of the host's own numbers have eight bytes each.
            count["bytes"] += first.nbytes
            count["calls"] += 1
            return collective(first, *others, **options)

        return counted

    dist.all_reduce = counting(dist.all_reduce)
    dist.all_gather_into_tensor = counting(dist.all_gather_into_tensor)
    found: dict[str, Any] = {}
    with joined("cpu") as ranks:
        for optimizer in OPTIMIZERS:
            count.update(bytes=0, calls=0)
            folder = args.out / f"{optimizer}-{ranks.size}"
            config = dataclasses.replace(
                preset_config(args.preset),
                **SETTINGS,
                optimizer=optimizer,
                max_iters=args.iterations - 1,
                eval_interval=args.iterations,
                data_dir=args.data,
                out_dir=folder,
            )
            counted = BeforeEvaluation(count)
            train(config, counted, ranks=ranks)
            found[optimizer] = counted.snapshot
        started = time.perf_counter()
        for _ in range(QUESTIONS):
            ranks.any(False)
        found["question"] = (time.perf_counter() - started) / QUESTIONS
        if ranks.leads:
            (args.out / f"{ranks.size}.json").write_text(json.dumps(found))


def losses(folder: Path) -> list[float]:
    """The training loss of every iteration."""
    rows = [row for row in RunFolder(folder).read_rows() if isinstance(row, IterationRow)]
    return [row.loss for row in rows if row.loss is not None]


def table(args: argparse.Namespace) -> list[str]:
    """The table's lines, and the time of a question to all processes."""
    lines = [
        "| optimizer | processes | last loss | validation loss | largest difference of a training loss | "
        "tok/s | memory | exchanged an iteration |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for optimizer in OPTIMIZERS:
        alone = losses(args.out / f"{optimizer}-1")
        for size in SIZES:
            folder = args.out / f"{optimizer}-{size}"
            own, summary = losses(folder), RunFolder(folder).read_summary()
            assert summary is not None and summary.validation is not None
            count = json.loads((args.out / f"{size}.json").read_text())[optimizer]
            furthest = max(abs(a - b) / a for a, b in zip(alone, own, strict=True))
            lines.append(
                f"| {optimizer} | {size} | {own[-1]:.6f} | {summary.validation.loss:.6f} | "
                f"{furthest:.1e} | "
                f"{summary.median_tokens_per_second:,.0f} | {summary.peak_memory_bytes / 1e9:.2f} GB | "
                f"{count['bytes'] / (args.iterations - 1) / 1e6:.2f} MB in "
                f"{count['calls'] / (args.iterations - 1):.0f} collectives |"
            )
    for size in SIZES[1:]:
        seconds = json.loads((args.out / f"{size}.json").read_text())["question"]
        lines.append(f"A question to {size} processes takes {seconds * 1e6:.0f} us.")
    return lines


def main() -> None:
    """Train with every number of processes, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="prepared data set")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--here", action="store_true", help="be one of the processes")
    args = parser.parse_args()
    if args.here:
        train_here(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for size in SIZES:
        start = [sys.executable] if size == 1 else [*launcher, str(size)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*start, *sys.argv, "--here"], env=env, check=True)
    print("\n".join(table(args)))


if __name__ == "__main__":
    main()
