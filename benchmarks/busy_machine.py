"""Train while other programs use the same cores: tokens a second under each way of waiting.

    python benchmarks/busy_machine.py [--preset nano] [--seconds 6] [--repeats 3] [--load 0 2]

Threads of torch's OpenMP library wait for each other many thousand times in a step. While they spin at
full speed, the one that they wait for may have no core. Every row of the table is a separate process,
and the rows take turns, so that a machine that changes its pace does so for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# How threads wait, by environment variables of GNU OpenMP. The first row is torch as it is, the second
# training as storylab does it, which chooses while it runs.
WAYS: dict[str, dict[str, str]] = {
    "torch as it is": {},
    "storylab": {},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BURN = "while True: sum(range(10000))"
# One measurement, in a separate process. The first seconds, in which storylab tries what is faster, do
# not count: runs take hours.
MEASURE = """
import dataclasses, json, sys, time, torch
from storylab.config import preset_config
from storylab.training.cores import CoreSharing, same_bits_with_one_thread
from storylab.training.measure import StepTimer
preset, seconds, vocab, name, compiled = sys.argv[1:]
config = dataclasses.replace(
    preset_config(preset), batch_size=16, gradient_accumulation_steps=1, device="cpu",
    compile=compiled == "True",
)
learner = StepTimer(config, int(vocab)).state
windows = torch.randint(int(vocab), (16, config.block_size + 1))
cores = CoreSharing(
    name == "storylab", lambda: same_bits_with_one_thread(learner, 0, windows, 0.0)
)
def step():
    cores.begin()
    start = time.perf_counter()
    learner.step(0, windows, 0.0, cores.tick)
    took = time.perf_counter() - start
    cores.end()
    return took
step()
begin = time.perf_counter()
while time.perf_counter() - begin < 8:
    step()
times = []
while sum(times) < float(seconds):
    times.append(step())
cores.close()
print(json.dumps(16 * config.block_size * len(times) / sum(times)))
"""


@contextmanager
def burning(count: int, nice: int) -> Iterator[None]:
    """Other processes, each of which would use a whole core."""
    command = ["nice", "-n", str(nice), sys.executable, "-c", BURN]
    others = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def tokens_per_second(name: str, args: argparse.Namespace) -> float:
    """Mean over some seconds of steps of 16 windows of 128 tokens."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_"))}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE]
    command += [args.preset, str(args.seconds), str(args.vocab), name, str(args.compile)]
    answer = subprocess.run(
        command, env=kept | WAYS[name], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(json.loads(answer.stdout))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--load", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--nice", type=int, default=10, help="of the other processes")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args(argv)
    print(
        f"{os.cpu_count()} cores, {args.preset}, {args.vocab:,} words, median (least to most) tok/s"
    )
    for load in args.load:
        found: dict[str, list[float]] = defaultdict(list)
        with burning(load, args.nice):
            for _ in range(args.repeats):
                for name in args.ways:
                    found[name].append(tokens_per_second(name, args))
        for name, rates in found.items():
            print(
                f"{load} other processes  {name:<15} {statistics.median(rates):>8,.0f} "
                f"({min(rates):,.0f} to {max(rates):,.0f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
