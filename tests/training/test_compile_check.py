"""Compiled code is checked before a run relies on it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from samples import TINY, MakeConfig
from storylab import compiler
from storylab.config import METHODS, TrainConfig
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
    """Let blocks be compiled by a compiler with one fault, which otherwise runs the operations as they
    are; torch itself decides when compiled code is used and when not."""

    def install(fault: str) -> None:
        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                first, *others = graph(*args)
                return (Wrong.apply(first, fault), *others)

            return run

        def compile_blocks(model: Transformer) -> None:
            torch.compiler.reset()
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
        # The run is resumed on a machine without a compiler.
        monkeypatch.setattr(f"storylab.{module}.missing_for_compiling", lambda device: "a compiler")
    resume(run.folder, dataclasses.replace(run.read_config(), max_iters=9))
    assert run.read_config().compile is False


def test_a_failing_compiler_stops_nothing(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        raise RuntimeError("fatal error: Python.h: No such file")

    def compile_blocks(model: Transformer) -> None:
        torch.compiler.reset()
        for block in model.blocks:
            block.compile(backend=broken)

    monkeypatch.setattr(Transformer, "compile_blocks", compile_blocks)
    # As a run that is long enough to be compiled.
    monkeypatch.setattr(setup, "resolve_compile", lambda config, precision: config.compile is None)
    run = train(tiny_config())
    assert run.read_config().compile is False and "Python.h" in run.read_environment().compile_fault


def test_compiled_code_alone_is_to_blame_for_what_is_finite_without(
    miscompiling: Callable[[str], None], tiny_config: MakeConfig
) -> None:
    """Not the learning rate; and the run is no result: it has not diverged."""
    miscompiling("nan")
    # Without the check before the first step: a fault that it does not see.
    config = tiny_config(compile=True, skip_checks=True)
    with pytest.raises(UserError, match="iteration 0: gradient norm is nan in compiled code"):
        train(config)
    assert config.out_dir is not None and open_run(config.out_dir).read_summary() is None


def test_an_evaluation_that_is_not_finite_is_not_the_compilers_fault(
    miscompiling: Callable[[str], None], tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs uncompiled."""
    miscompiling("none")
    # The loss of a model this small stays finite.
    monkeypatch.setattr(evaluator, "estimate_loss", lambda *_: float("nan"))
    with pytest.raises(Diverged, match="loss is nan"):
        train(tiny_config(compile=True))


def test_what_is_not_finite_uncompiled_either_has_diverged(
    miscompiling: Callable[[str], None], tiny_config: MakeConfig
) -> None:
    miscompiling("none")
    with pytest.raises(Diverged, match="Try a lower"):
        train(tiny_config(compile=True, learning_rate=1e30, min_lr=1e30, warmup_iters=0))


def test_a_compiled_run_records_its_check(
    miscompiling: Callable[[str], None], tiny_config: MakeConfig
) -> None:
    miscompiling("none")
    run = train(tiny_config(compile=True))
    assert len(run.read_environment().compile_checks) == 1
