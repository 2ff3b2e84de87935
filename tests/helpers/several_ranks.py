"""Runs of several processes: their config, torchrun, and the answers of ``ranks_program.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from samples import TINY
from storylab.config import TrainConfig, to_dict
from storylab.files import write_json
from storylab.record.folder import RunFolder

PROGRAM = Path(__file__).with_name("ranks_program.py")
COMMON: dict[str, Any] = {
    "model": TINY,
    "dtype": "float32",
    "batch_size": 2,
    "gradient_accumulation_steps": 6,
    "block_size": 16,
    "max_iters": 12,
    "learning_rate": 1e-2,
    "warmup_iters": 2,
    "eval_interval": 4,
    "eval_iters": 3,
    "log_interval": 2,
    "device": "cpu",
    "compile": False,
}


def launch(processes: int, folder: Path, plan: dict[str, Any], *flags: str) -> tuple[int, str]:
    """Carry out a plan under torchrun on this machine; the exit code and all output."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "plan.json", plan)
    paths = [str(PROGRAM.parent), *sys.path]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *flags]
    command += ["--nproc_per_node", str(processes), str(PROGRAM), str(folder / "plan.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    return done.returncode, done.stdout + done.stderr


def step(config: TrainConfig, **values: Any) -> dict[str, Any]:
    return {"do": "train", "config": to_dict(config), **values}


def answer(folder: Path, name: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.{rank}.json").read_text())
    return found


def numbers(run: RunFolder, key: str) -> list[float]:
    rows = [getattr(row, key, None) for row in run.read_rows()]
    return [value for value in rows if value is not None]
