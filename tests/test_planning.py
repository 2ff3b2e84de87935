"""Plans: against published speeds, by hand, and by what must hold of any prediction."""

from __future__ import annotations

import dataclasses
import re
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import Mock

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import plan_check
from executors import InProcess
from storylab.cli import main
from storylab.config import ModelConfig, TrainConfig, preset_config
from storylab.execution.job import Outcome
from storylab.model.cost import StepPart, attention_flops, training_flops
from storylab.model.transformer import Transformer
from storylab.optim import OPTIMIZERS
from storylab.optim.build import build_optimizers, skip_where
from storylab.planning.bench import shares_line
from storylab.planning.gpus import GPUS, Gpu, GpuName, known_gpu
from storylab.planning.predict import can_run
from storylab.planning.roofline import (
    Work,
    gains,
    memory_bytes,
    micro_batch_work,
    predicted_shares,
    tokens_per_second,
)
from storylab.planning.software import LIMIT, SOFTWARE, SoftwareName
from storylab.precision.edit import find_recipe
from storylab.precision.formats import FORMATS
from storylab.precision.recipes import RECIPES
from storylab.training.measure import Measured, StepTimer, _device_seconds, part_of
from storylab.training.precision import Precision
from storylab.training.state import TrainState

RECORD = TrainConfig()
VOCAB = 50257
SHAPE = ModelConfig(n_layer=4, n_head=12, n_kv_head=3, n_embd=192, n_hidden=512)


class Traffic(TorchDispatchMode):
    """Counts kernels and the bytes that they read and write, products and attention left out."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes = 0, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        product = name in ("mm", "bmm", "baddbmm") or "attention" in name
        nothing = function.is_view or name.startswith(("empty", "new_empty", "_unsafe_view"))
        if not (product or nothing or name.startswith(("_record", "scalar_tensor"))):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if torch.is_tensor(t)]
            self.kernels += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


def work_named(config: TrainConfig, name: str, vocab_size: int = 300) -> Work:
    """One line of a plan with eager PyTorch."""
    work = micro_batch_work(config, vocab_size, SOFTWARE["eager"])
    return next(each for each in work if each.name == name)


@pytest.mark.parametrize("row", plan_check.PUBLISHED, ids=lambda row: f"{row.what} {row.dtype}")
def test_published_speeds_come_out(row: plan_check.Published) -> None:
    assert row.ratio == pytest.approx(1.0, abs=0.1)
    limit = dataclasses.replace(row, software=LIMIT)
    assert limit.predicted > row.high


def test_products_are_those_of_the_model() -> None:
    for recipe in (None, *RECIPES.values()):
        work = micro_batch_work(RECORD, VOCAB, LIMIT, recipe)
        tokens = RECORD.batch_size * RECORD.block_size
        # The backward pass of attention makes its scores again.
        again = 0.5 * attention_flops(RECORD.model, RECORD.block_size)
        expected = training_flops(RECORD.model, VOCAB, RECORD.block_size) + again
        assert sum(part.flops for part in work) == pytest.approx(tokens * expected)


def test_the_products_of_a_muon_update_are_counted() -> None:
    """Against torch's counter, on a step of the optimizer itself."""
    shape = ModelConfig(n_layer=2, n_head=4, n_kv_head=1, n_embd=64, n_hidden=160)
    config = TrainConfig(model=shape, optimizer="muon", gradient_accumulation_steps=1)
    model = Transformer(shape, 300)
    muon, _ = build_optimizers(model, config)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    products = work_named(config, f"update, products of {OPTIMIZERS['muon'].label}")
    assert products.flops == counter.get_total_flops() > 0


def passes(model: ModelConfig) -> Traffic:
    """Forward and backward pass of a model over 8 x 128 tokens, its head left out, without a device
    that would redo anything."""
    network = Transformer(model, 300).to("meta")
    tokens = torch.zeros(8, 128, dtype=torch.int64, device="meta")
    with Traffic() as seen, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        network.hidden_states(tokens).float().sum().backward()
    return seen


@pytest.mark.parametrize(
    "option",
    [
        {"qk_norm": True},
        {"embedding_residual": True},
        {"value_residual": "first_layer"},
    ],
    ids=str,
)
def test_the_elementwise_work_of_a_models_options_is_counted(option: dict[str, Any]) -> None:
    """Against what PyTorch does, within what its copies on the way come to."""
    model = dataclasses.replace(SHAPE, **option)
    with_option, without = (
        work_named(dataclasses.replace(RECORD, batch_size=8, model=m), StepPart.ELEMENTWISE)
        for m in (model, SHAPE)
    )
    seen, seen_without = passes(model), passes(SHAPE)
    assert with_option.bytes - without.bytes == pytest.approx(
        seen.bytes - seen_without.bytes, rel=0.5
    )
    assert with_option.kernels - without.kernels == pytest.approx(
        seen.kernels - seen_without.kernels, rel=0.5
    )


@pytest.mark.parametrize("optimizer", ["muon", "normuon"])
def test_the_elementwise_work_of_a_muon_update_is_counted(optimizer: str) -> None:
    """As it is on CUDA, where a step may be skipped on the device."""
    config = TrainConfig(model=SHAPE, optimizer=optimizer, gradient_accumulation_steps=1)  # type: ignore[arg-type]
    model = Transformer(SHAPE, 300)
    optimizers = build_optimizers(model, config)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    skip_where(optimizers, torch.tensor(False))
    optimizers[0].step()  # which makes its state
    with Traffic() as seen:
        optimizers[0].step()
    matrices = sum(p.numel() for p, _ in model.block_matrices())
    rest = 28 * (SHAPE.parameter_count(300) - matrices)  # by AdamW
    update = work_named(config, "update")
    assert update.bytes - rest == pytest.approx(seen.bytes, rel=0.1)
    assert update.kernels - 10 == pytest.approx(seen.kernels, rel=0.1)


def test_an_update_costs_the_same_kernels_compiled_or_not() -> None:
    """On a card without limits there is nothing but kernels to wait for. By hand: 10 of AdamW and clipping,
    5 of the average, 15 products and 28 others for each of four shapes, 4 for each of 16 weights."""
    gpu = Gpu("card", (8, 9), {"bfloat16": 1e9}, 1e9, 24, 300)
    config = dataclasses.replace(RECORD, model=SHAPE, optimizer="normuon", average_share=0.1)
    for kind in ("eager", "compiled"):
        work = micro_batch_work(config, 300, SOFTWARE[kind])
        update = sum(w.seconds(gpu, SOFTWARE[kind]) for w in work if w.part is StepPart.UPDATE)
        assert update * 16 == pytest.approx((10 + 5 + 4 * 43 + 16 * 4) * 8e-6, rel=1e-3)


@pytest.mark.parametrize("average_share", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_memory_is_that_of_what_an_update_keeps(optimizer: str, average_share: float) -> None:
    """Against the tensors that a learner has after a step; what its passes keep is the same for all."""
    config = TrainConfig(
        model=SHAPE,
        optimizer=optimizer,  # type: ignore[arg-type]
        average_share=average_share,
        batch_size=1,
    )

    def kept(config: TrainConfig) -> int:
        learner = TrainState(config, 300, Precision(torch.device("cpu"), torch.float32))
        learner.step(0, torch.zeros(1, 9, dtype=torch.int64), learning_rate=0.0)
        states = [s for o in learner.optimizers for s in o.state.values()]
        tensors = [t for state in states for t in state.values()]
        tensors += [*learner.model.parameters(), *learner.ema.tensors.values()]
        tensors += [p.grad for p in learner.model.parameters() if p.grad is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    plain = dataclasses.replace(config, optimizer="adamw", average_share=0.0)
    rest = memory_bytes(plain, 300) - 16 * SHAPE.parameter_count(300)
    assert memory_bytes(config, 300) - rest == pytest.approx(kept(config), rel=1e-5)


def test_no_software_is_faster_than_the_limit() -> None:
    for gpu in GPUS.values():
        for dtype in ("bfloat16", "fp8", "nvfp4"):
            recipe = find_recipe(dtype)
            if can_run(gpu, recipe):
                limit = tokens_per_second(RECORD, VOCAB, gpu, LIMIT, recipe)
                for software in SOFTWARE.values():
                    assert tokens_per_second(RECORD, VOCAB, gpu, software, recipe) < limit


def test_amdahls_law() -> None:
    """On a card whose memory costs nothing, by hand: what converts goes twice as fast."""
    gpu = Gpu("card", (8, 9), {"bfloat16": 100.0, "fp8": 200.0}, 1e9, 24, 300)
    work = micro_batch_work(RECORD, VOCAB, LIMIT)
    whole = sum(part.flops for part in work)
    linear = next(part.flops for part in work if part.name == "linear layers")
    _, most = gains(RECORD, VOCAB, gpu, LIMIT, RECIPES["fp8"])
    assert most == pytest.approx(whole / (whole - linear / 2), rel=1e-4)


def test_the_hoped_for_gains_are_out_of_reach() -> None:
    """The record hoped for 2x from FP8 and 4x from NVFP4 on one RTX 5090."""
    for kind in (*SOFTWARE.values(), LIMIT):
        for dtype, hoped in (("fp8", 2.0), ("nvfp4", 4.0)):
            brings, most = gains(RECORD, VOCAB, GPUS["rtx5090"], kind, RECIPES[dtype])
            assert 1.0 < brings < most < hoped


def test_what_a_card_lacks_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "rtx4090", "a100", "--dtype", "mxfp8"]) == 0
    assert capsys.readouterr().out.count("cannot train in mxfp8") == 2
    assert main(["plan", "experiments/03-nvfp4.toml", "--scale", "record", "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16" in out and "H100 SXM cannot train in nvfp4" in out


def test_a_plan_shows_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    out = capsys.readouterr().out
    assert "112,934,400 parameters" in out and "RTX 5090" in out and "is predicted" in out
    for text in ("output head", "tok/s", "kWh", "FP8 can bring at most", "NVFP4 brings", "memory"):
        assert text in out
    assert main(["plan", "--batch_size", "2048"]) == 0
    assert "take a smaller batch" in capsys.readouterr().out


def test_this_machine_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    answer = {"seconds": 1.0, "joules": None, "memory": 1e9, "products": None}
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

    monkeypatch.setattr("storylab.training.precision.resolve_backend", lambda *args: Library())
    flags = (
        "--preset nano --batch_size 2 --block_size 16 --device cpu --seconds 0.1 --vocab_size 300"
    )
    args = ["bench", *flags.split(), "--dtypes", "fp8", "--attentions", "full"]
    assert main(args, InProcess()) == 0
    row, parts_line = capsys.readouterr().out.splitlines()[-2:]
    assert row.startswith("fp8, full") and "%" not in parts_line and "te" in parts_line


def test_a_card_times_products_in_a_row_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card whose clock stands still but for 3 ms a product; the host waits once for all of them."""
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
def test_a_bench_takes_small_micro_batches_on_a_cpu_unless_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    expected: int,
) -> None:
    monkeypatch.setattr("storylab.planning.bench.bench_lines", lambda *args: [])
    assert main(["bench", "--preset", "nano", "--device", "cpu", *flags]) == 0
    assert f"{expected} x 128 tokens" in capsys.readouterr().out


def test_a_kernel_belongs_to_the_operation_that_started_it() -> None:
    above = SimpleNamespace(name="aten::_scaled_dot_product_flash_attention", cpu_parent=None)
    event = SimpleNamespace(name="aten::_flash_attention_forward", cpu_parent=above)
    assert part_of(event) is StepPart.ATTENTION


def test_the_parts_of_a_step_are_its_whole() -> None:
    config = preset_config("nano")
    config = dataclasses.replace(config, batch_size=2, block_size=32, device="cpu", dtype="mxfp8")
    shares = StepTimer(config, 300).shares(2)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert set(shares) == set(StepPart) and all(share >= 0 for share in shares.values())
    for part in StepPart:
        assert shares[part] > 0, part


def test_predicted_parts_are_those_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand from the plan's lines; and both are in the line of a bench on a GPU that is listed."""
    gpu, software, recipe = GPUS["h100"], SOFTWARE["compiled"], RECIPES["fp8"]
    predicted = predicted_shares(RECORD, VOCAB, gpu, software, recipe)
    assert list(predicted) == list(StepPart) and all(predicted.values())
    work = micro_batch_work(RECORD, VOCAB, software, recipe)
    times = {each.name: each.seconds(gpu, software) for each in work}
    head = times["output head"] + times["logits and loss"]
    assert predicted[StepPart.HEAD] == pytest.approx(head / sum(times.values()))
    measured = dict.fromkeys(map(str, StepPart), 1 / 7)  # as they come from a worker, by JSON
    config = dataclasses.replace(RECORD, compile=True, dtype="fp8", backend="te")
    line = shares_line(measured, config, VOCAB, gpu)
    assert f"head and loss 14% (predicted {predicted[StepPart.HEAD]:.0%})" in line
    assert "predicted" not in shares_line(measured, config, VOCAB, None)


@pytest.mark.parametrize(
    "code",
    [
        "import storylab.planning.roofline, storylab.planning.plan_text, storylab.cli.verbs.plan",
        "from storylab.cli import main; main(['plan', '--gpu', 'rtx5090', '--dtype', 'nvfp4'])",
    ],
)
def test_a_plan_does_not_load_torch(code: str) -> None:
    code += "; import sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_every_number_of_a_gpu_has_a_source() -> None:
    for gpu in GPUS.values():
        assert "NVIDIA" in gpu.source and gpu.source.endswith("."), gpu.name
        units = {form.matrix_unit for form in FORMATS.values()} | {"bfloat16"}
        assert "bfloat16" in gpu.tflops and gpu.tflops.keys() <= units


@pytest.mark.parametrize(
    ("driver", "card"),
    [
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L40S", None),
    ],
)
def test_a_card_is_known_by_the_name_its_driver_gives(driver: str, card: str | None) -> None:
    """Names as nvidia-smi prints them; a peak that is another card's would be worse than none."""
    found = known_gpu(driver)
    assert found == (GPUS[card] if card else None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "experiments/02-fp8.toml --scale record --batch-size=8 --no_compile",
            "--batch_size, --compile: experiments/02-fp8.toml",
        ),
        ("experiments/02-fp8.toml --preset nano", "--preset: "),
        ("--preset nano --scale record", "--scale: for an experiment"),
        ("--software compiled", "--software: for an experiment"),
        ("--vocab_size -1", "vocab_size is -1"),
        ("experiments/02-fp8.toml --scale record --vocab_size -1", "vocab_size is -1"),
    ],
)
def test_flags_that_a_plan_would_not_read_are_refused(
    capsys: pytest.CaptureFixture[str], flags: str, words: str
) -> None:
    assert main(["plan", *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


def test_flags_of_its_own_are_read_with_an_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "experiments/02-fp8.toml --scale record --gpu h100 --software compiled"
    assert main(["plan", *flags.split()]) == 0
    few_words = capsys.readouterr().out
    assert main(["plan", *flags.split(), "--vocab-size", "999999"]) == 0
    assert "H100 SXM, torch.compile" in few_words != capsys.readouterr().out


def test_every_card_and_kind_of_software_has_a_flag() -> None:
    assert {*GPUS, "this"} == set(get_args(GpuName))
    assert set(SOFTWARE) == set(get_args(SoftwareName))


def test_an_experiment_is_calibrated_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiments/02-fp8.toml", "--gpu", "this"]) == 2
    assert "--dry_run" in capsys.readouterr().err
