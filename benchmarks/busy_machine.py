"""Training beside other work on the same cores: tokens a second under each way of waiting.

    python benchmarks/busy_machine.py [--preset nano] [--seconds 6] [--repeats 3] [--load 0 2]

Threads of torch's OpenMP library wait for each other many thousand times in a step. While they spin at
full speed, the one that they wait for may have no core. Every row of the table is a process of its own,
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

# How threads wait, as environment variables of GNU OpenMP. "as shipped" is what torch does by itself,
# "storylab" is what the command line sets.
WAYS: dict[str, dict[str, str]] = {
    "as shipped": {},
    "spin 100": {"GOMP_SPINCOUNT": "100"},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "spin 3,000": {"GOMP_SPINCOUNT": "3000"},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
    "spin 30,000": {"GOMP_SPINCOUNT": "30000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BURN = "while True: sum(range(10000))"
# One measurement, in a process of its own.
MEASURE = """
import dataclasses, json, sys
from storylab.config import preset_config
from storylab.training.measure import StepTimer
preset, seconds = sys.argv[1], float(sys.argv[2])
config = dataclasses.replace(
    preset_config(preset), batch_size=16, gradient_accumulation_steps=1, device="cpu", compile=False
)
timer = StepTimer(config, int(sys.argv[3]))
timer.step(16)
times = timer.times(16, seconds)
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


def tokens_per_second(way: dict[str, str], preset: str, seconds: float, vocab: int) -> float:
    """Mean over ``seconds`` of steps of 16 windows of 128 tokens."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_"))}
    command = [sys.executable, "-c", MEASURE, preset, str(seconds), str(vocab)]
    answer = subprocess.run(command, env=kept | way, capture_output=True, text=True, check=True)
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
                    rate = tokens_per_second(WAYS[name], args.preset, args.seconds, args.vocab)
                    found[name].append(rate)
        for name, rates in found.items():
            print(
                f"{load} other processes  {name:<12} {statistics.median(rates):>8,.0f} "
                f"({min(rates):,.0f} to {max(rates):,.0f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
