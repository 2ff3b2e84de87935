"""Backends: what they need, what they refuse, and torchao against the emulation."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from conformance import generator
from engine_stand_in import (
    B200,
    RTX_4090,
    stand_in,
)
from samples import TINY
from storylab.config import ModelConfig
from storylab.errors import UserError
from storylab.precision.backends import te, torchao
from storylab.precision.backends.protocol import require_aligned
from storylab.precision.backends.torchao import Torchao
from storylab.precision.recipes import (
    RECIPES,
)
from storylab.precision.selftest import check_layer
from storylab.training.precision import choose_precision


def test_a_missing_library_is_no_reason_to_emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformer_engine.pytorch", "torchao.float8"):
        monkeypatch.setitem(sys.modules, name, None)
    for backend in (te, torchao):
        with pytest.raises(UserError, match=r"pip install.*--backend emulated"):
            backend.load(RECIPES["fp8-current"], "card", RTX_4090)


def test_a_backend_needs_a_gpu_and_a_recipe() -> None:
    cpu = torch.device("cpu")
    assert choose_precision(cpu, "nvfp4").backend == "emulated"
    assert choose_precision(cpu, "bfloat16").backend == "auto"
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        choose_precision(cpu, "nvfp4", backend="te")
    with pytest.raises(UserError, match="for low precision"):
        choose_precision(cpu, "bfloat16", backend="emulated")


def test_shapes_that_hardware_does_not_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, RECIPES["mxfp8"])
    backend = te.load(RECIPES["mxfp8"], "card", B200)
    require_aligned(backend, ModelConfig(), 128)
    with pytest.raises(UserError, match="48 is not a multiple of 32"):
        require_aligned(backend, ModelConfig(), 48)
    with pytest.raises(UserError, match="n_hidden: 48"):
        require_aligned(backend, TINY, 128)


@pytest.mark.parametrize("dtype", ["fp8-current", "fp8-rowwise"])
def test_torchao_through_its_door_is_the_emulation(dtype: str) -> None:
    """torchao's own layer, its products emulated as there is no GPU, against ours."""
    float8 = pytest.importorskip("torchao.float8", reason="no torchao")
    backend = torchao.load(RECIPES[dtype], "card", RTX_4090)
    assert isinstance(backend, Torchao)
    config = dataclasses.replace(backend.config, emulate=True)
    backend = Torchao(float8.convert_to_float8_training, config)
    weight = torch.randn(96, 64, generator=generator(1))
    for check in check_layer("layer", weight, RECIPES[dtype], backend):
        assert check.low and check.failure is None
        assert check.deviation is not None and check.deviation < 0.002  # its output is bfloat16
