"""Fused passes give the bits of the plain ones, or are not used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import conformance
from conformance import generator
from storylab.compiler import missing_for_compiling
from storylab.precision import fused as fusing
from storylab.precision.formats import E4M3, E5M2
from storylab.precision.quantize import (
    mxfp8,
    nvfp4,
    per_row,
    per_tensor,
    random_bytes,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantize",
    [
        lambda x: per_tensor(x, E4M3),
        lambda x: per_row(x, E4M3),
        mxfp8,
        nvfp4,
        lambda x: nvfp4(x, square=True),
        lambda x: nvfp4(x, square=True, four_over_six=True),
        lambda x: nvfp4(x, random=random_bytes(x.shape, generator(8)), four_over_six=True),
    ],
)
def test_fused_passes_give_the_same_bits(
    quantize: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing_for_compiling("cpu") is not None:
        pytest.skip("nothing here compiles C++")
    torch.compiler.reset()
    # torch has no public count of the graphs that it compiled.
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for x in list(conformance.tensors(128, 256))[:6]:
        # FUSE_FROM is the size from which passes are fused: never, and always.
        monkeypatch.setattr(fusing, "FUSE_FROM", math.inf)
        eager = quantize(x)
        monkeypatch.setattr(fusing, "FUSE_FROM", 0)
        assert torch.equal(quantize(x).operand, eager.operand)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


@pytest.mark.slow
def test_many_kinds_of_passes_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the compiler makes of one function before it gives up."""
    if missing_for_compiling("cpu") is not None:
        pytest.skip("nothing here compiles C++")
    monkeypatch.setattr(fusing, "FUSE_FROM", 0)
    torch.compiler.reset()
    # torch has no public count of the graphs that it compiled.
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    x = torch.randn(64, 64, generator=generator(1)) * 1e-6
    forms = [dataclasses.replace(E4M3, max=float(2**power)) for power in range(10)]
    for form in (E4M3, E5M2, *forms):
        for quantize in (per_tensor, mxfp8):
            monkeypatch.setattr(fusing, "FUSE_FROM", 0)
            ours = quantize(x, form).operand
            # FUSE_FROM is the size from which passes are fused: never, and always.
            monkeypatch.setattr(fusing, "FUSE_FROM", math.inf)
            assert torch.equal(ours, quantize(x, form).operand)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= before + 2 * 12


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> torch.Tensor:
        # The error that torch raises for a compiler that fails; it has no public name.
        raise torch._dynamo.exc.BackendCompilerFailed(broken, RuntimeError("no Python.h"), None)

    # A compiler that fails, or is wrong, on every machine; tensors of any size are fused.
    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    monkeypatch.setattr(fusing, "FUSE_FROM", 0)
    doubled = fusing.fused(lambda x: 2 * x)
    assert doubled(torch.ones(2)).tolist() == doubled(torch.ones(2)).tolist() == [2.0, 2.0]


def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for one kind of arguments and wrong for another: each is found on its first tensor."""

    def miscompiled(values: torch.Tensor, form: str) -> torch.Tensor:
        return 2 * values + (form == "e5m2") * (values == 3.0)

    # A compiler that fails, or is wrong, on every machine; tensors of any size are fused.
    monkeypatch.setattr(torch, "compile", lambda function, **_: miscompiled)
    monkeypatch.setattr(fusing, "FUSE_FROM", 0)
    calls: list[str] = []

    def double(values: torch.Tensor, form: str) -> torch.Tensor:
        calls.append(form)
        return 2 * values

    doubled = fusing.fused(double)
    x = torch.tensor([1.0, math.nan, 3.0])
    for form in ("e4m3", "e4m3", "e5m2", "e5m2"):
        assert doubled(x, form)[[0, 2]].tolist() == [2.0, 6.0]
    assert doubled.wrong
    assert doubled.proven == {kind: kind[1] == "e4m3" for kind in doubled.proven}
    assert calls.count("e4m3") == 1  # from then on the kernel alone
