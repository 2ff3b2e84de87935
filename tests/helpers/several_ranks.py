"""Runs of several processes: their config, torchrun, and the answers of ``ranks_program.py``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from samples import TINY
from storylab.config import TrainConfig, to_dict
from storylab.files import write_json
from storylab.record.folder import RunFolder

SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden")
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


def launch(
    processes: int, folder: Path, plan: dict[str, Any], *flags: str, nodes: int = 1
) -> tuple[int, str]:
    """Carry out a plan under torchrun on this machine; the largest exit code and all output.

    Args:
        processes: of each node.
        folder: gets the plan.
        plan: see ``ranks_program.py``.
        flags: of torchrun.
        nodes: torchruns that find each other on the loopback device, as on as many machines.
    """
    folder.mkdir(exist_ok=True)
    write_json(folder / "plan.json", plan)
    paths = [str(PROGRAM.parent), *sys.path]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "torch.distributed.run", *_meeting(nodes), *flags]
    command += ["--nproc_per_node", str(processes), str(PROGRAM), str(folder / "plan.json")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    agents = [subprocess.Popen(command, env=env, **pipes) for _ in range(nodes)]
    outputs = [agent.communicate(timeout=400)[0] for agent in agents]
    return max(agent.returncode for agent in agents), "".join(outputs)


def _meeting(nodes: int) -> list[str]:
    if nodes == 1:
        return ["--standalone"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"]
    return ["--nnodes", str(nodes), "--local_addr", "127.0.0.1", "--rdzv_id", "test", *place]


def command(folder: Path, data_dir: Path, **changes: Any) -> list[str]:
    """The arguments of ``storylab train`` for a run of ``COMMON`` with some changes."""
    values = {k: v for k, v in (COMMON | changes).items() if k not in ("model", "compile")}
    values |= {name: getattr(TINY, name) for name in SHAPE}
    values |= {"data_dir": data_dir, "out_dir": folder}
    return ["train", "--no_compile", *(x for k, v in values.items() for x in (f"--{k}", str(v)))]


def step(config: TrainConfig, **values: Any) -> dict[str, Any]:
    return {"do": "train", "config": to_dict(config), **values}


def answer(folder: Path, name: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.{rank}.json").read_text())
    return found


def numbers(run: RunFolder, key: str) -> list[float]:
    rows = [getattr(row, key, None) for row in run.read_rows()]
    return [value for value in rows if value is not None]
