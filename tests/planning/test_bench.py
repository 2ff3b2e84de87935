"""Measurements of this machine and their rows."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import MagicMock, Mock

import psutil
import pytest
import torch

from executors import InProcess
from storylab.cli import main
from storylab.config import Dtype, ModelConfig, TrainConfig
from storylab.execution.job import Outcome
from storylab.model.cost import StepPart
from storylab.planning.bench import variants
from storylab.planning.measurements import time_steps

# _device_seconds times products on a GPU: its clock is replaced below, and no command reaches it on a CPU.
from storylab.training.measure import Measured, _device_seconds


def test_this_machine_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The shortest calibration: the numbers do not matter here.
    monkeypatch.setattr("storylab.cli.verbs.plan.CALIBRATION_SECONDS", 0.0)
    flags = "--gpu this --preset nano --batch_size 2 --block_size 16 --dtype nvfp4 --device cpu"
    assert main(["plan", *flags.split()]) == 0
    assert "this machine, from" in capsys.readouterr().out
    config = TrainConfig(max_iters=9, gradient_accumulation_steps=4)
    assert Measured(0.5, 1.0, 0.0).seconds(config) == pytest.approx(10 * (4 * 0.5 + 1.0))


@pytest.mark.slow
def test_a_bench_times_every_precision_and_attention(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = (
        "--preset nano --batch_size 2 --block_size 16 --device cpu --seconds 0.1 --vocab_size 300 "
        "--backend emulated"
    )
    dtypes = "--dtypes bfloat16 nvfp4 --attentions window:8"
    assert main(["bench", *flags.split(), *dtypes.split()]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if re.match(r"\w+, \S+", line)]
    names = ["bfloat16, full", "nvfp4, full", "bfloat16, window:8"]
    assert [re.split(r"\s{2,}", row)[0] for row in rows] == names
    assert all("GB" in row and "unknown" in row and "not available" in row for row in rows)
    assert "quantizing" in out and "linear layers" in out
    for wrong in ("--seconds 0", "--dtype fp8", "--dtypes", "--attentions x", "--vocab_size -1"):
        assert main(["bench", *wrong.split()]) == 2


def bench_rows(capsys: pytest.CaptureFixture[str], flags: str) -> str:
    """The output of a bench of the nano model where every job answers that a step takes a second."""
    answer = {"seconds": 1.0, "joules": None, "memory": 1e9, "products": None, "busy": None}
    answer["shares"] = dict.fromkeys(StepPart, 1 / len(StepPart))
    executor = InProcess(lambda job: Outcome("done", answer=answer))
    assert main(["bench", "--preset", "nano", "--device", "cpu", *flags.split()], executor) == 0
    return capsys.readouterr().out


def test_what_a_bench_cannot_run_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, why in (("--backend te", "needs an NVIDIA GPU"), ("--recipe history=9", "delayed")):
        out = bench_rows(capsys, f"--dtypes mxfp8 bfloat16 {flags}")
        assert re.search(rf"mxfp8, full +cannot run here: .*{why}", out)
        assert re.search(r"bfloat16, full +1,024 ", out)


def test_a_recipe_is_for_the_dtypes_of_a_bench_that_have_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = bench_rows(capsys, "--recipe high_first=1 --attentions full")
    for dtype in ("bfloat16", "float32", "fp8", "mxfp8", "nvfp4"):
        assert re.search(rf"^{dtype}, full +1,024 ", out, re.MULTILINE)


def test_a_narrow_stream_is_for_the_dtypes_of_a_bench_that_keep_it_narrow() -> None:
    config = TrainConfig(model=ModelConfig(residual_dtype="bfloat16"))
    dtypes: list[Dtype] = ["float32", "float16", "bfloat16", "fp8"]
    streams = [c.model.residual_dtype for c in variants(config, dtypes, ["full", "window:64"])]
    assert streams == ["float32", "float32", "bfloat16", "bfloat16", "bfloat16"]


def test_a_bench_does_not_take_apart_what_a_library_computes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TransformerEngine's products have names of their own; here is a library that only has the name."""

    class Library:
        name, alignment = "te", 1

        def layer(self, linear: torch.nn.Linear) -> torch.nn.Module:
            return linear

        def context(self) -> AbstractContextManager[None]:
            return nullcontext()

    # Libraries of kernels need a GPU.
    monkeypatch.setattr("storylab.training.precision.resolve_backend", lambda *args: Library())
    flags = (
        "--preset nano --batch_size 2 --block_size 16 --device cpu --seconds 0.1 --vocab_size 300"
    )
    args = ["bench", *flags.split(), "--dtypes", "fp8", "--attentions", "full"]
    assert main(args, InProcess()) == 0
    row, parts_line = capsys.readouterr().out.splitlines()[-2:]
    assert row.startswith("fp8, full") and "%" not in parts_line and "te" in parts_line


def test_a_card_times_products_in_a_row_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card whose clock advances by 3 ms a product only; the host waits once for all of them."""
    done: list[None] = []
    waits = Mock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            self.at = 3.0 * len(done)

        def synchronize(self) -> None:
            waits()

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: None)
    assert _device_seconds(lambda: done.append(None), torch.device("cuda")) == pytest.approx(3e-3)
    assert len(done) == 20 and waits.call_count == 1


@pytest.mark.parametrize(
    ("device", "backend", "expected"),
    [("cuda", None, 0.75), ("cpu", None, None), ("cuda", "te", None)],
)
def test_a_bench_says_how_long_a_gpu_is_busy(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str | None, expected: float | None
) -> None:
    """From its own work in a step, 1.5 of 2 seconds; a CPU always works, te's work is in no part."""
    timer = Mock(device=torch.device(device))
    timer.precision.hardware = backend
    timer.times.return_value = [2.0]
    timer.part_seconds.return_value = dict.fromkeys(StepPart, 1.5 / len(StepPart))
    # Nothing here has a GPU.
    monkeypatch.setattr("storylab.planning.measurements.StepTimer", lambda *args: timer)
    monkeypatch.setattr("storylab.planning.measurements.Telemetry", MagicMock())
    found = time_steps(TrainConfig(), lambda *args: None, vocab_size=300, seconds=1.0)
    assert found["busy"] == (expected and pytest.approx(expected))
    assert (found["shares"] is None) == (backend is not None)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bench_that_is_stopped_says_so_in_one_line(number: int) -> None:
    command = [sys.executable, "-m", "storylab", "bench", "--preset", "nano", "--device", "cpu"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as bench:
        deadline = time.monotonic() + 120
        process = psutil.Process(bench.pid)
        while not process.children() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # now it listens to signals
        bench.send_signal(number)
        _, err = bench.communicate(timeout=60)
    assert (bench.returncode, err) == (128 + number, "storylab: interrupted\n")


@pytest.mark.parametrize(("flags", "expected"), [([], 8), (["--batch_size", "64"], 64)])
def test_a_bench_takes_small_micro_batches_on_a_cpu_by_default(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    expected: int,
) -> None:
    # Nothing is measured: the heading alone is read.
    monkeypatch.setattr("storylab.planning.bench.bench_lines", lambda *args: [])
    assert main(["bench", "--preset", "nano", "--device", "cpu", *flags]) == 0
    assert f"{expected} x 128 tokens" in capsys.readouterr().out
