"""Seconds that `storylab list` and the page of `storylab ui` take over many long runs, modules imported,
and whole commands against a Python that does nothing.

    python benchmarks/listing.py [--runs 1000] [--rows 10000] [--rounds 9] [--commit COMMIT]
        [--old_summaries]

One short run is trained; its record is stretched to the given number of rows and hard-linked into every
other folder, so the disk holds one copy and the page cache all of it. ``--commit`` also times the code of a
commit on the same folders. ``--old_summaries`` removes the keys that listings read from the summaries;
they are then computed from the rows. Whole commands take turns, and the fastest of their rounds counts, in
processor time and by the clock, so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAIN = """--preset nano --n_layer 1 --n_hidden 32 --device cpu --batch_size 2 --block_size 32
--gradient_accumulation_steps 1 --max_iters 0 --eval_interval 1 --eval_iters 1 --min_lr 0""".split()
LISTING_KEYS = ("started", "median_tokens_per_second", "training_memory_bytes")
TIMED = """
import contextlib, io, sys, time
from storylab.cli import main
empty, runs = sys.argv[1:]
with contextlib.redirect_stdout(io.StringIO()):
    main(["list", "--runs", empty])  # imports everything
    begin = time.perf_counter()
    main(["list", "--runs", runs])
print(time.perf_counter() - begin)
"""
PAGE = """
import sys, time
from pathlib import Path
import msgspec
from storylab.ui.library import Library
library = Library(Path(sys.argv[1]))
for _ in range(2):
    begin = time.perf_counter()
    msgspec.json.encode(library.overview())
    print(time.perf_counter() - begin)
"""


def call(source: Path, *args: str) -> str:
    """Run Python with the code in a checkout; returns what it printed."""
    env = os.environ | {"PYTHONPATH": str(source / "src")}
    command = [sys.executable, "-W", "ignore", *args]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def make_runs(place: Path, count: int, rows: int, old: bool) -> Path:
    """Make ``count`` finished runs of ``rows`` iterations each; returns their folder."""
    data, first = place / "data", place / "runs" / "run-00000"
    prepared = ["--source", "builtin", "--tokenizer", "bpe:300", "--builtin_stories", "400"]
    call(ROOT, "-m", "storylab", "prepare", *prepared, "--out", str(data))
    folders = ["--data_dir", str(data), "--out_dir", str(first)]
    call(ROOT, "-m", "storylab", "train", *TRAIN, *folders)
    row = json.loads((first / "metrics.jsonl").read_text().splitlines()[0])
    lines = (json.dumps(row | {"iteration": i, "tokens": 64 * (i + 1)}) for i in range(rows))
    (first / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    summary = json.loads((first / "summary.json").read_text())
    summary |= {"iterations": rows, "tokens": 64 * rows}
    if old:
        summary = {key: value for key, value in summary.items() if key not in LISTING_KEYS}
    (first / "SHA256SUMS").unlink(missing_ok=True)  # of the files as they were
    (first / "summary.json").write_text(json.dumps(summary, indent=2))
    for number in range(1, count):
        folder = first.with_name(f"run-{number:05}")
        folder.mkdir()
        for path in first.iterdir():
            if path.is_file():
                os.link(path, folder / path.name)
    return first.parent


def startup(runs: Path, rounds: int) -> None:
    """Print the least time of whole commands, and its ratio to that of an empty program."""
    commands = {
        "python -c pass": ["-c", "pass"],
        "storylab --help": ["-m", "storylab", "--help"],
        "storylab list": ["-m", "storylab", "list", "--runs", str(runs)],
    }
    processor, clock = (dict.fromkeys(commands, math.inf) for _ in range(2))
    for _ in range(rounds):
        for name, args in commands.items():
            spent, begin = children_seconds(), time.perf_counter()
            call(ROOT, *args)
            clock[name] = min(clock[name], time.perf_counter() - begin)
            processor[name] = min(processor[name], children_seconds() - spent)
    nothing, *_ = commands
    print(f"whole commands, the fastest of {rounds}: processor seconds, clock seconds")
    for name in commands:
        ratios = (
            f"{processor[name] / processor[nothing]:6.1f} x {clock[name] / clock[nothing]:6.1f} x"
        )
        print(f"  {name:<16} {processor[name]:7.3f} {clock[name]:7.3f} {ratios}")


def children_seconds() -> float:
    """Processor seconds, user and system, of the processes that have ended so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--commit", help="time this version too")
    parser.add_argument("--old_summaries", action="store_true")
    parser.add_argument("--rounds", type=int, default=9, help="of whole commands")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        runs = make_runs(place, args.runs, args.rows, args.old_summaries)
        empty = place / "empty"
        empty.mkdir()
        versions = {"this code": ROOT}
        if args.commit:
            before = versions[args.commit] = place / "code"
            clone = ["git", "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(before)]
            subprocess.run(clone, check=True)
            checkout = ["git", "-C", str(before), "checkout", "--quiet", "--detach", args.commit]
            subprocess.run(checkout, check=True)
        print(f"storylab list over {args.runs:,} finished runs of {args.rows:,} rows")
        for name, source in versions.items():
            seconds = float(call(source, "-c", TIMED, str(empty), str(runs)))
            print(f"  {name:<12} {seconds:8.2f} s")
        first, again = map(float, call(ROOT, "-c", PAGE, str(runs)).split())
        print(f"the page of storylab ui, first and again\n  {first:.2f} s, {again:.2f} s")
        startup(runs, args.rounds)


if __name__ == "__main__":
    main()
