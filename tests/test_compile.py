"""Compiled code is proven before a run relies on it, and flags that are known to miscompile are avoided."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import TINY
from storylab import compiler
from storylab.cli import main
from storylab.config import METHODS, TrainConfig, to_dict
from storylab.errors import Diverged, UserError
from storylab.model.transformer import Transformer
from storylab.record.folder import open_run
from storylab.record.run import load_run
from storylab.record.schema import IterationRow
from storylab.training import evaluator, setup
from storylab.training.compile_check import check_compiled
from storylab.training.observers import Observer
from storylab.training.resume import resume
from storylab.training.setup import resolve_device
from storylab.training.state import TrainState
from storylab.training.train import train

pytestmark = [
    pytest.mark.slow,
    # torch's own, while it looks at the tensors of a block.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
MakeConfig = Callable[..., TrainConfig]
NEEDS_COMPILER = pytest.mark.skipif(
    compiler.missing_for_compiling("cpu") is not None, reason="nothing here compiles C++"
)


class Wrong(torch.autograd.Function):
    """A block's output as it should be, with a fault put into its value or its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, fault: str) -> Tensor:
        ctx.fault = fault
        return value * 1.05 if fault == "value" else value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        if ctx.fault == "scaled":
            grad *= 1.1
        elif ctx.fault == "garbage":
            grad.view(-1)[::10] = 1.0
        elif ctx.fault == "nan":
            grad.view(-1)[3] = float("nan")
        return grad, None


@pytest.fixture
def miscompiling(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let blocks be compiled by a compiler with one fault, which runs the operations as they are but for
    it; torch itself decides when compiled code is used and when not."""

    def install(fault: str) -> None:
        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                first, *others = graph(*args)
                return (Wrong.apply(first, fault), *others)

            return run

        def compile_blocks(model: Transformer) -> None:
            torch._dynamo.reset()
            for block in model.blocks:
                block.compile(backend=backend, dynamic=False)

        monkeypatch.setattr(Transformer, "compile_blocks", compile_blocks)
        # What the machine lacks does not matter to this compiler.
        for module in ("training.setup", "training.resume"):
            monkeypatch.setattr(f"storylab.{module}.missing_for_compiling", lambda device: None)

    return install


def learner(config: TrainConfig) -> tuple[TrainState, Tensor]:
    """A compiled learner and a micro-batch of random tokens for it."""
    config, precision = resolve_device(dataclasses.replace(config, compile=True))
    shape = (config.batch_size, config.block_size + 1)
    windows = torch.randint(300, shape, generator=torch.Generator().manual_seed(1))
    return TrainState(config, 300, precision), windows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["record", "fast"])
def test_right_code_passes_with_room_to_spare(
    miscompiling: Callable[[str], None], tiny_config: MakeConfig, dtype: str, method: str
) -> None:
    miscompiling("none")
    model = dataclasses.replace(TINY, **METHODS[method].get("model", {}))  # type: ignore[index]
    subject, windows = learner(tiny_config(dtype=dtype, model=model))
    before = [p.detach().clone() for p in subject.model.parameters()]
    check = check_compiled(subject, windows)
    assert check.passed and check.share < 0.6
    assert check.loss == pytest.approx(check.loss_uncompiled, abs=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, subject.model.parameters(), strict=True))
    assert all(p.grad is None for p in subject.model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fault", ["value", "scaled", "garbage", "nan"])
def test_wrong_code_is_caught(
    miscompiling: Callable[[str], None], tiny_config: MakeConfig, dtype: str, fault: str
) -> None:
    miscompiling(fault)
    check = check_compiled(*learner(tiny_config(dtype=dtype)))
    assert not check.passed
    assert json.loads(json.dumps(check.to_dict(), allow_nan=False))["passed"] is False


def test_a_run_goes_on_uncompiled(
    miscompiling: Callable[[str], None], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    """To the losses of a run that was never compiled, and the record says why."""
    plain = train(tiny_config(compile=False, out_dir=tmp_path / "plain"))
    miscompiling("garbage")
    lines: list[str] = []

    class Lines(Observer):
        def line(self, text: str) -> None:
            lines.append(text)

    def by_default(config: TrainConfig, precision: Any) -> bool:
        return config.compile is not False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "resolve_compile", by_default)  # as a run that is long enough
        run = train(tiny_config(), Lines())
    losses = [
        [row.loss for row in r.read_rows() if isinstance(row, IterationRow)] for r in (plain, run)
    ]
    assert losses[0] == losses[1]
    assert run.read_config().compile is False
    assert "the gradient of" in run.read_environment().compile_fault
    assert [c["passed"] for c in run.read_environment().compile_checks] == [False]
    assert sum("goes on uncompiled" in line for line in lines) == 1


def test_what_was_asked_for_by_name_stops(
    miscompiling: Callable[[str], None], tiny_config: MakeConfig
) -> None:
    miscompiling("nan")
    config = tiny_config(compile=True)
    with pytest.raises(UserError, match=r"wrong results .*gradient of .*leave out --compile"):
        train(config)
    assert config.out_dir is not None and not config.out_dir.exists()  # nothing was begun


def test_a_resumed_run_is_checked_again(
    miscompiling: Callable[[str], None], tiny_config: MakeConfig
) -> None:
    """On a machine that miscompiles it goes on uncompiled, and can be resumed again from there."""
    miscompiling("none")
    run = train(tiny_config(compile=True, schedule="constant", warmup_iters=0))
    assert run.read_environment().compile_checks[0]["passed"]
    miscompiling("garbage")
    longer = dataclasses.replace(run.read_config(), max_iters=10)
    resume(run.folder, longer)
    assert run.read_config().compile is False and load_run(run.folder).results.iterations == 11
    assert "the gradient of" in run.read_environment().resumed[0].compile_fault
    resume(run.folder, dataclasses.replace(run.read_config(), max_iters=12))
    assert load_run(run.folder).results.iterations == 13


def test_a_resumed_run_goes_on_without_a_compiler(
    miscompiling: Callable[[str], None], tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    miscompiling("none")
    run = train(tiny_config(compile=True, schedule="constant", warmup_iters=0))
    for module in ("training.setup", "training.resume"):
        monkeypatch.setattr(f"storylab.{module}.missing_for_compiling", lambda device: "a compiler")
    resume(run.folder, dataclasses.replace(run.read_config(), max_iters=9))
    assert run.read_config().compile is False


def test_a_failing_compiler_stops_nothing(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        raise RuntimeError("fatal error: Python.h: No such file")

    def compile_blocks(model: Transformer) -> None:
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(backend=broken)

    monkeypatch.setattr(Transformer, "compile_blocks", compile_blocks)
    monkeypatch.setattr(setup, "resolve_compile", lambda config, precision: config.compile is None)
    run = train(tiny_config())
    assert run.read_config().compile is False and "Python.h" in run.read_environment().compile_fault


def test_compiled_code_alone_is_to_blame_for_what_is_finite_without(
    miscompiling: Callable[[str], None], tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the learning rate; and the run is no result: it has not diverged."""
    miscompiling("nan")
    monkeypatch.setattr(
        "storylab.training.train.with_proven_compiler", lambda setup, *_, **__: setup
    )
    config = tiny_config(compile=True)
    with pytest.raises(UserError, match="iteration 0: gradient norm is nan in compiled code"):
        train(config)
    assert config.out_dir is not None and open_run(config.out_dir).read_summary() is None


def test_an_evaluation_that_is_not_finite_is_not_the_compilers_fault(
    miscompiling: Callable[[str], None], tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs uncompiled."""
    miscompiling("none")
    monkeypatch.setattr(evaluator, "estimate_loss", lambda *_: float("nan"))
    with pytest.raises(Diverged, match="loss is nan"):
        train(tiny_config(compile=True))


def test_what_is_not_finite_uncompiled_either_has_diverged(
    miscompiling: Callable[[str], None], tiny_config: MakeConfig
) -> None:
    miscompiling("none")
    with pytest.raises(Diverged, match="Try a lower"):
        train(tiny_config(compile=True, learning_rate=1e30, min_lr=1e30, warmup_iters=0))


def test_what_compiling_lacks_is_said(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    lacking = compiler.missing_for_compiling
    assert lacking("cpu") == "a C++ compiler"
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    assert lacking("cuda") == "the package triton"
    monkeypatch.setattr(compiler, "find_spec", lambda name: name)
    assert lacking("cuda") == "a C compiler"
    monkeypatch.setattr(compiler.shutil, "which", lambda name: f"/usr/bin/{name}" if name else None)
    monkeypatch.setattr(compiler.sysconfig, "get_path", lambda *_: "/nowhere")
    for device in ("cpu", "cuda"):
        assert "/nowhere/Python.h" in str(lacking(device))
    assert main(["train", "--compile", "--device", "cpu"]) == 2
    assert "needs Python's header files" in capsys.readouterr().err


AVX512 = "avx512f avx512bw avx512cd avx512dq avx512vl"
GCC = """#!/bin/sh
echo "The following options are target specific:"
echo "  -march=                     		{march}"
echo "  -mtune=                     		{mtune}"
echo "  Known valid arguments for -march= option:"
"""


@pytest.mark.parametrize(
    ("march", "mtune", "flags", "expected"),
    [
        # Sapphire Rapids under gcc 12.2, which does not know it, and Zen 4, which it takes for Zen 3.
        ("cooperlake", "generic", "", "cooperlake"),
        ("znver3", "znver3", "", None),
        # Under a gcc that only sees instruction sets, the processor's own flags decide.
        ("x86-64-v4", "generic", f"avx2 fma bmi2 {AVX512}", "skylake-avx512"),
        ("x86-64-v3", "generic", "avx2 fma bmi2", "haswell"),
        ("x86-64", "generic", "sse4_2", None),
    ],
)  # fmt: skip
def test_tuning_is_named_where_gcc_would_tune_for_no_processor(
    march: str,
    mtune: str,
    flags: str,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gcc = tmp_path / "g++"
    gcc.write_text(GCC.format(march=march, mtune=mtune))
    gcc.chmod(0o755)
    monkeypatch.setenv("CXX", str(gcc))
    monkeypatch.setattr(compiler.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(compiler, "processor_flags", lambda: set(flags.split()))
    compiler.tuned_name.cache_clear()
    try:
        assert compiler.tuned_name() == expected
    finally:
        compiler.tuned_name.cache_clear()


@NEEDS_COMPILER
def test_inductor_is_told_the_tuning_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import config

    if not hasattr(config.cpp, "march"):
        pytest.skip("this torch has no such setting")
    monkeypatch.setattr(compiler, "tuned_name", lambda: "icelake-server")
    with config.patch({"cpp.march": None}):
        compiler.set_tuning()
        assert config.cpp.march == "icelake-server"
    with config.patch({"cpp.march": "native"}):
        compiler.set_tuning()
        assert config.cpp.march == "native"


# Two 32 x 32 bfloat16 transposes in one kernel: what gcc 12 gets wrong with generic tuning.
SMALLEST = """
import sys, torch
from torch._inductor import config
config.cpp.march = "x86-64-v4"
x, w = torch.randn(8, 64, 128).bfloat16(), torch.randn(128, 64)
def g(x, w):
    t = x.transpose(1, 2)
    halves = (t[..., :32] * w[:, :32]).bfloat16(), (t[..., 32:] * w[:, 32:]).bfloat16()
    return torch.cat(halves, -1)
print("wrong" if not torch.equal(torch.compile(g, dynamic=False)(x, w), g(x, w)) else "right")
"""
MODEL = """
import dataclasses, json, sys, torch
from torch._inductor import config
from storylab.config import from_dict
from storylab.training.compile_check import check_compiled
from storylab.training.state import TrainState
from storylab.training.setup import resolve_device
if sys.argv[2] == "miscompiling":
    config.cpp.march = "x86-64-v4"
run, precision = resolve_device(from_dict(json.loads(sys.argv[1])))
windows = torch.randint(300, (run.batch_size, run.block_size + 1))
print(json.dumps(check_compiled(TrainState(run, 300, precision), windows).to_dict()))
"""


@NEEDS_COMPILER
def test_the_known_miscompile_is_caught_and_avoided(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    """With the flags that are known to be wrong, built here, and with those that storylab chooses."""

    def run(script: str, *args: str) -> str:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-W", "ignore", "-c", script, *args]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True)
        return answer.stdout.strip()

    shape = dataclasses.replace(TINY, n_layer=1, n_head=2, n_kv_head=1, n_embd=128)
    config = tiny_config(model=shape, dtype="bfloat16", block_size=128, compile=True)
    arguments = json.dumps(to_dict(config))
    assert json.loads(run(MODEL, arguments, "as chosen"))["passed"]
    if run(SMALLEST) != "wrong":
        pytest.skip("this compiler and processor get the known case right, or cannot run it")
    assert not json.loads(run(MODEL, arguments, "miscompiling"))["passed"]


def test_a_compiled_run_records_its_check(
    miscompiling: Callable[[str], None], tiny_config: MakeConfig
) -> None:
    miscompiling("none")
    run = train(tiny_config(compile=True))
    assert len(run.read_environment().compile_checks) == 1
