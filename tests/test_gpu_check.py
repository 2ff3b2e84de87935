"""The script that a person with a GPU runs keeps running, shown on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    """Steps that touch most of what it imports; each leaves its findings, none a failure."""
    steps = "environment,correct,compile_proof,train_eager"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--preset", "nano", "--only", steps]
    command += [
        "--out",
        str(tmp_path / "out"),
        "--work",
        str(tmp_path / "work"),
        "--seconds",
        "900",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert not [row for row in rows if "failed" in row]
    states = {row["step"]: row["state"] for row in rows if row["name"] == "(step)"}
    assert states == dict.fromkeys(steps.split(","), "done")
    (record,) = (row for row in rows if row["name"] == "record bfloat16")
    assert abs(record["difference"]) < 1e-3 and record["worst_gradient_error"] < 0.02
