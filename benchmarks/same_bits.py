"""Compare the working tree with an earlier commit: the same runs must give the same bits.

    python benchmarks/same_bits.py COMMIT [--only adamw fp8]

Six short runs and two small experiments are made by each version's own command line, from the same data.
Losses, gradient norms, validation losses, samples and the tensors of both checkpoints are compared bit by
bit, and so are the names of the experiments' run folders, which hold a digest of what each run computes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).parents[1]
COMMON = """--preset nano --n_hidden 256 --device cpu --batch_size 4 --gradient_accumulation_steps 2
--warmup_iters 2 --max_iters 6 --eval_interval 3 --eval_iters 2 --log_interval 1
""".split()
CONFIGS = {
    "adamw": "--learning_rate 3e-3",
    "normuon": "--optimizer normuon",
    "fp8": "--dtype fp8 --backend emulated --min_lr 0",
    "nvfp4": "--dtype nvfp4 --backend emulated",
    "window": "--attention window:64*2,full --block_size 256 --batch_size 2",
    "fast": "--method fast --max_iters 20",
    "compiled": "--compile",
}
EXPERIMENTS = {
    "rates": """
title = "Rates"
purpose = "Do digests stay?"
factor = "learning_rate"
seeds = [1, 2]
[arms]
"3e-3" = { learning_rate = 3e-3 }
"1e-3" = { learning_rate = 1e-3, min_lr = 1e-3, schedule = "constant" }
""",
    "precision": """
title = "Precision"
purpose = "Do digests stay?"
factor = "precision"
seeds = [1]
[arms]
bfloat16 = { dtype = "bfloat16" }
fp8 = { dtype = "fp8", backend = "emulated" }
nvfp4 = { dtype = "nvfp4", backend = "emulated", recipe = "hadamard=false *.weight.square=false" }
""",
}
SHARED = """
[config]
preset = "nano"
max_iters = 2
warmup_iters = 1
batch_size = 2
gradient_accumulation_steps = 1
eval_interval = 2
eval_iters = 1
"""


def call(source: Path, *args: str) -> None:
    """Run a storylab command with the code in a checkout."""
    env = os.environ | {"PYTHONPATH": str(source / "src")}
    command = [sys.executable, "-W", "ignore", "-m", "storylab", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{source}: storylab {' '.join(args)}\n{done.stdout}{done.stderr}")


def traces(source: Path, data: Path, out: Path, only: Sequence[str]) -> dict[str, Any]:
    """Everything by which two versions are compared, by name."""
    found: dict[str, Any] = {}
    for name in only:
        if name in CONFIGS:
            run = out / name
            flags = [*COMMON, *CONFIGS[name].split()]
            call(source, "train", *flags, "--data_dir", str(data), "--out_dir", str(run))
            found |= {f"{name}: {key}": value for key, value in run_traces(run).items()}
        else:
            file = out / f"{name}.toml"
            file.write_text(EXPERIMENTS[name] + SHARED)
            runs = ["--runs", str(out / f"{name}-runs"), "--data_dir", str(data)]
            call(source, "experiment", "run", str(file), *runs)
            folders = (path.name for path in (out / f"{name}-runs").iterdir() if path.is_dir())
            found[f"{name}: run folders"] = sorted(folders)
    return found


def run_traces(run: Path) -> dict[str, Any]:
    """Results of a run: rows, the summary's numbers, hashes of weights and of the losses of stories."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    names = ("loss", "grad_norm", "lr", "clipped", "train_loss", "val_loss")
    found: dict[str, Any] = {name: [row[name] for row in rows if name in row] for name in names} | {
        name: summary.get(name)
        for name in ("final_val_loss", "best_val_loss", "status", "samples", "perplexity")
    }
    for checkpoint in ("best", "last"):
        digest = sha256()
        with safe_open(run / "checkpoints" / f"{checkpoint}.safetensors", "numpy") as file:
            for name in sorted(file.keys()):
                digest.update(name.encode() + file.get_tensor(name).tobytes())
        found[checkpoint] = digest.hexdigest()
    for name in ("story", "test"):
        if (path := run / f"{name}_losses.npy").exists():  # data of a version without a test split
            found[f"{name} losses"] = sha256(path.read_bytes()).hexdigest()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print what differs; 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commit", help="the version before")
    names = [*CONFIGS, *EXPERIMENTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        before = place / "code"
        clone = ["git", "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(before)]
        subprocess.run(clone, check=True)
        resolve = ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{args.commit}^{{commit}}"]
        commit = subprocess.run(resolve, check=True, capture_output=True, text=True).stdout.strip()
        checkout = ["git", "-C", str(before), "checkout", "--quiet", "--detach", commit]
        subprocess.run(checkout, check=True)
        data = place / "data"
        prepared = ["--source", "builtin", "--tokenizer", "bpe:300", "--builtin_stories", "600"]
        call(before, "prepare", *prepared, "--out", str(data))
        results = []
        for name, source in (("before", before), ("after", ROOT)):
            (place / name).mkdir()
            results.append(traces(source, data, place / name, args.only))
    old, new = results
    apart = [key for key in old | new if old.get(key) != new.get(key)]
    for key in apart:
        print(f"{key} differs:\n  before {old.get(key)}\n  after  {new.get(key)}")
    print(f"{len(old) - len(apart)} of {len(old)} traces are the same to the bit")
    return bool(apart)


if __name__ == "__main__":
    sys.exit(main())
