"""Soak: changed files of every kind, by a coverage-guided fuzzer, against the code that reads them.

    python benchmarks/fuzz.py [TARGET ...] [--runs 50000] [--seconds 600] [--out fuzz-out]

Needs Atheris (``pip install atheris``; Linux, Python up to 3.13). Each target of ``fuzz_targets.py`` gets a
process, which ends after that many inputs or seconds. A finding is an exception that is no UserError, an
input that takes over 20 seconds, or memory beyond a limit; equal ones are kept once, as a file in
``OUT/findings``. The next soak goes on from ``OUT/corpus``. ``OUT/counts.jsonl`` has a line a process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

SECONDS_OF_AN_INPUT = 20
MEMORY = 2 << 30
IN_MEMORY = Path("/dev/shm")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="by default all")
    parser.add_argument("--runs", type=int, default=50_000, help="inputs of each target")
    parser.add_argument("--seconds", type=int, default=600, help="the most for each target")
    parser.add_argument("--out", type=Path, default=Path("fuzz-out"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.here:
        fuzz(args.targets[0], args)
    return soak(args)


def soak(args: argparse.Namespace) -> int:
    """Fuzz every target in a process of its own; returns the number of findings."""
    from fuzz_targets import targets

    example = whole_files(args.out)
    with tempfile.TemporaryDirectory() as scratch:
        names = args.targets or list(targets(example, Path(scratch)))
    for name in names:
        options = ["--runs", str(args.runs), "--seconds", str(args.seconds), "--out", str(args.out)]
        command = [sys.executable, "-W", "ignore", __file__, name, "--here", *options]
        log = args.out / f"{slug(name)}.log"
        with log.open("wb") as output:
            code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
        count = args.out / f"{slug(name)}.count"
        inputs = int(count.read_text()) if count.exists() else 0
        found = [p for p in (args.out / "findings").glob(f"{slug(name)}-*") if p.suffix != ".txt"]
        line = {"target": name, "inputs": inputs, "exit": code, "findings": len(found)}
        with (args.out / "counts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"time": time.strftime("%FT%TZ", time.gmtime())}) + "\n")
        print(f"{name}: {inputs:,} inputs, {len(found)} findings, exit code {code}", flush=True)
    return len(list((args.out / "findings").glob("*.txt")))


def whole_files(out: Path) -> Any:
    """The files to begin with, made once."""
    from fuzz_targets import Example, make_example

    known = out / "example.json"
    if not known.exists():
        example = make_example(out / "example")
        known.write_text(json.dumps({k: str(v) for k, v in vars(example).items()}))
    return Example(**{k: Path(v) for k, v in json.loads(known.read_text()).items()})


def slug(name: str) -> str:
    """``name`` as part of a file's name."""
    return "".join(c if c.isalnum() else "-" for c in name)


def fuzz(name: str, args: argparse.Namespace) -> None:
    """Fuzz one target; ends this process."""
    import atheris

    with atheris.instrument_imports(include=["storylab"]):
        import fuzz_targets
    from storylab.errors import UserError

    place = tempfile.mkdtemp(dir=IN_MEMORY if IN_MEMORY.is_dir() else None)
    target = fuzz_targets.targets(whole_files(args.out), Path(place))[name]
    corpus, findings = args.out / "corpus" / slug(name), args.out / "findings"
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    count, kinds = 0, set()

    def one_input(data: bytes) -> None:
        nonlocal count
        count += 1
        if count % 500 == 0 or count >= args.runs:
            (args.out / f"{slug(name)}.count").write_text(str(count))
        try:
            target.read(data)
        except UserError as error:
            str(error)
        except Exception as error:
            kind = kind_of(error)
            if kind not in kinds:
                kinds.add(kind)
                digest = hashlib.sha256(kind.encode()).hexdigest()[:10]
                path = findings / f"{slug(name)}-{digest}"
                path.write_bytes(data)
                path.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))

    def change(data: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if target.change is None or draw.random() < 0.3:
            return atheris.Mutate(data, most)
        return target.change(data, draw)[:most]

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    longest = max(fuzz_targets.MOST, *(2 * len(seed) for seed in target.seeds))
    limits = {
        "runs": args.runs,
        "max_total_time": args.seconds,
        "timeout": SECONDS_OF_AN_INPUT,
        "rss_limit_mb": MEMORY >> 19,
        "max_len": longest,
        "artifact_prefix": f"{findings}/{slug(name)}-",
    }
    flags = [f"-{key}={value}" for key, value in limits.items()]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one_input, custom_mutator=change)
    atheris.Fuzz()


def kind_of(error: BaseException) -> str:
    """The type of an error and the deepest line of storylab that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "storylab" in f.filename] or list(frames)
    return f"{type(error).__name__} at {ours[-1].filename}:{ours[-1].lineno}"


if __name__ == "__main__":
    sys.exit(min(main(), 1))
