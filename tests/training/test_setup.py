"""The start of a run: compiling, folders that are taken, windows and tokens."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import storylab
from finished_runs import CPU, InterruptAt, found
from samples import MakeConfig
from storylab.compiler import missing_for_compiling
from storylab.config import TrainConfig
from storylab.data.dataset import Dataset
from storylab.errors import Interrupted, UserError
from storylab.locks import exclusive
from storylab.record import checkpoint
from storylab.record.folder import open_run
from storylab.record.schema import IterationRow
from storylab.training.precision import ComputePolicy, choose_precision
from storylab.training.resume import resume
from storylab.training.setup import resolve_compile
from storylab.training.train import train


@pytest.mark.parametrize(
    ("changes", "compiler", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"max_iters": 0, "gradient_accumulation_steps": 1}, True, False),
        ({"max_iters": 0, "gradient_accumulation_steps": 1, "compile": True}, True, True),
        ({"compile": False}, True, False),
        ({"dtype": "fp8"}, True, False),
    ],
)
def test_long_runs_are_compiled_where_they_can_be(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], compiler: bool, expected: bool
) -> None:
    missing = None if compiler else "a C++ compiler"
    # Machines with and without a compiler.
    monkeypatch.setattr("storylab.training.setup.missing_for_compiling", lambda device: missing)
    config = TrainConfig(device="cpu", **changes)
    precision = choose_precision(CPU, config.dtype)
    assert resolve_compile(config, precision) is expected


@pytest.mark.parametrize(("max_iters", "expected"), [(20, [True, False]), (200, [True, True])])
def test_a_gpu_compiles_longer_runs_than_a_cpu(
    monkeypatch: pytest.MonkeyPatch, max_iters: int, expected: list[bool]
) -> None:
    """Twenty iterations of 113M parameters are minutes on a CPU and seconds on a GPU."""
    # A machine that can compile for both.
    monkeypatch.setattr("storylab.training.setup.missing_for_compiling", lambda device: None)
    config = TrainConfig(max_iters=max_iters)
    policies = [ComputePolicy(torch.device(name), torch.bfloat16) for name in ("cpu", "cuda")]
    assert [resolve_compile(config, policy) for policy in policies] == expected


def test_a_run_killed_before_it_had_a_config_can_be_started_again(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(max_iters=0)
    with monkeypatch.context() as patch:
        # A fault after the folder is made and before its config is written.
        patch.setattr("storylab.record.stages.current_stage", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    assert config.out_dir.is_dir()
    assert train(config).read_summary() is not None


@pytest.mark.slow
def test_two_processes_cannot_write_one_run(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    with pytest.raises(Interrupted):
        train(config, InterruptAt(3, signal.SIGTERM))
    before = (config.out_dir / "metrics.jsonl").read_bytes()
    with exclusive(config.out_dir), pytest.raises(UserError, match="another process"):
        resume(config.out_dir)
    assert (config.out_dir / "metrics.jsonl").read_bytes() == before
    assert resume(config.out_dir).read_summary() is not None


@pytest.mark.slow
@pytest.mark.parametrize(("block", "unseen"), [(500, 411), (16, 7)])
def test_a_run_names_tokens_that_are_never_trained_on(
    tiny_config: MakeConfig, dataset: Dataset, block: int, unseen: int
) -> None:
    tokens = dataset.manifest["splits"]["train"]["tokens"]
    assert (tokens - 1) % block == unseen
    run = train(tiny_config(block_size=block, max_iters=1, batch_size=1))
    assert found(run).unseen_tokens == unseen
    line = f"the last {unseen} of {tokens:,} training tokens ({unseen / tokens:.1%}) are never"
    assert (line in (run.folder / "log.txt").read_text()) == (unseen / tokens > 0.001)


def test_a_folder_with_something_in_it_is_not_written_over(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    config.out_dir.mkdir()
    (config.out_dir / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        train(config)
    assert [p.name for p in config.out_dir.iterdir()] == ["notes.txt"]


def test_a_window_longer_than_a_split_is_refused(tiny_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="block_size"):
        train(tiny_config(block_size=100_000))


@pytest.mark.slow
def test_compiled_blocks_train_like_eager_ones(tiny_config: MakeConfig, tmp_path: Path) -> None:
    if missing_for_compiling("cpu") is not None:
        pytest.skip("nothing here compiles C++")
    script = (
        "import sys, json, torch; from storylab.config import from_dict\n"
        "from storylab.training.train import train\n"
        "train(from_dict(json.loads(sys.argv[1])))"
    )
    eager, compiled = (
        tiny_config(out_dir=tmp_path / str(c), compile=c, max_iters=3) for c in (False, True)
    )
    train(eager)
    arguments = json.dumps(storylab.config.to_dict(compiled))
    subprocess.run([sys.executable, "-c", script, arguments], check=True, capture_output=True)
    a, b = open_run(eager.out_dir), open_run(compiled.out_dir)
    losses = [
        [row.loss for row in run.read_rows() if isinstance(row, IterationRow)] for run in (a, b)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    names = [set(checkpoint.load(run.checkpoint("last"))[0]) for run in (a, b)]
    assert names[0] == names[1]
