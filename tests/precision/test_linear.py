"""Linear layers in low precision: products against float64, gradients against the straight-through
expression.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from conformance import generator
from quantized_layers import layer
from storylab.model.recompute import recompute
from storylab.precision.edit import find_recipe
from storylab.precision.formats import E4M3
from storylab.precision.linear import LayerContext, QuantizedLinear, product
from storylab.precision.quantize import (
    mxfp8,
    nvfp4,
    per_tensor,
)
from storylab.precision.recipes import (
    RECIPES,
)
from storylab.precision.state import QuantizationState


def test_products_are_those_of_float64() -> None:
    for quantize in (lambda x: per_tensor(x, E4M3), mxfp8, nvfp4):
        a, b = (quantize(torch.randn(64, 512, generator=generator(i))) for i in (1, 2))
        exact = (a.operand.double() @ b.operand.double().T) * (a.scale * b.scale).double()
        error = (product(a, b).double() - exact).abs().max() / exact.abs().max()
        assert error < 1e-6
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("name", RECIPES)
def test_the_host_reads_no_tensor_of_the_device(name: str) -> None:
    """Tensors of the device "meta" have no values, so that a read of one raises."""
    nowhere = torch.device("meta")
    recipe, state = RECIPES[name], QuantizationState(0, max_iters=10)
    quantized = QuantizedLinear(nn.Linear(64, 96, False, nowhere), recipe, state, "layer")
    rows, gradient = torch.empty(128, 64, device=nowhere), torch.empty(128, 96, device=nowhere)
    assert quantized.product(rows).shape == (128, 96)
    input_gradient, weight_gradient = quantized.gradients(rows, gradient)
    assert input_gradient.shape == rows.shape and weight_gradient.shape == (96, 64)
    with pytest.raises(RuntimeError):
        int(input_gradient.sum())


def test_random_bits_are_made_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    context = LayerContext(layer(RECIPES["nvfp4"]), "gradient", "input_gradient")
    on_device = Mock()
    # Nothing here has a GPU, which would wait for draws on the CPU.
    monkeypatch.setattr("storylab.precision.linear.hashed_bytes", on_device)
    monkeypatch.delattr("storylab.precision.linear.random_bytes")
    seeds = set()
    for _ in range(2):
        context.random_bytes(torch.Size((30, 7)), torch.device("cuda"))
        shape, seed, device = on_device.call_args.args
        assert shape == (30, 7) and device.type == "cuda"
        seeds.add(seed)
    assert len(seeds) == 2  # a new draw at every call


@pytest.mark.parametrize("name", ["fp8-current", "fp8-rowwise", "mxfp8", "nvfp4"])
def test_gradients_are_the_straight_through_products(name: str) -> None:
    """Each product written out with the quantisers, in float64."""
    recipe = dataclasses.replace(RECIPES[name], hadamard=False)
    for kind in ("input_gradient", "weight_gradient"):
        pair = getattr(recipe, kind)
        recipe = dataclasses.replace(
            recipe, **{kind: tuple(dataclasses.replace(o, stochastic=False) for o in pair)}
        )
    quantized = layer(recipe)
    x = torch.randn(128, 64, generator=generator(1), requires_grad=True)
    out_gradient = torch.randn(128, 96, generator=generator(2))
    out = quantized(x)
    out.backward(out_gradient)

    def value(tensor: torch.Tensor, operand: Any) -> torch.Tensor:
        values = tensor.detach().contiguous()
        return quantized.quantize(values, operand, "input", "any").value.double()

    w, g, r = quantized.weight, out_gradient, recipe
    assert r.forward and r.input_gradient and r.weight_gradient
    expected = [
        value(x, r.forward[0]) @ value(w, r.forward[1]).T,
        value(g, r.input_gradient[0]) @ value(w.T, r.input_gradient[1]).T,
        value(g.T, r.weight_gradient[0]) @ value(x.T, r.weight_gradient[1]).T,
    ]
    assert x.grad is not None and w.grad is not None
    for ours, theirs in zip((out, x.grad, w.grad), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("fp8", (0.045, 0.07, 0.07)),
        ("fp8-current", (0.045, 0.07, 0.07)),
        ("mxfp8", (0.045, 0.045, 0.045)),
        ("nvfp4", (0.16, 0.19, 0.18)),
    ],
)
def test_errors_are_as_large_as_the_formats_make_them(
    name: str, bounds: tuple[float, float, float]
) -> None:
    """Relative errors of output and gradients on normal draws."""
    quantized = layer(RECIPES[name])
    plain = quantized.weight.detach().clone().requires_grad_()
    x = torch.randn(512, 64, generator=generator(1), requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out_gradient = torch.randn(512, 96, generator=generator(2))
    out, reference = quantized(x), y @ plain.T
    out.backward(out_gradient)
    reference.backward(out_gradient)
    pairs = ((out, reference), (x.grad, y.grad), (quantized.weight.grad, plain.grad))
    for (ours, exact), bound in zip(pairs, bounds, strict=True):
        assert ours is not None and exact is not None
        error = float((ours - exact).detach().norm() / exact.detach().norm())
        assert bound / 2 < error < bound


def test_stochastic_rounding_is_of_seed_iteration_and_call() -> None:
    def gradient(iteration: int, calls: int = 1) -> torch.Tensor:
        quantized = layer(RECIPES["nvfp4"])
        quantized.state.advance(iteration)
        for _ in range(calls):
            x = torch.ones(32, 64, requires_grad=True)
            quantized(x).backward(torch.randn(32, 96, generator=generator(4)))
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(3), gradient(3))
    assert not torch.equal(gradient(3), gradient(4))
    assert not torch.equal(gradient(3), gradient(3, calls=2))


def test_weights_are_quantized_again_when_they_have_changed() -> None:
    quantized = layer(RECIPES["nvfp4"])
    x = torch.randn(32, 64, generator=generator(1))
    before = quantized(x)
    with torch.no_grad():
        quantized.weight.mul_(2.0)
    quantized.state.weights_changed()
    torch.testing.assert_close(quantized(x), 2 * before)


def test_delayed_scales_come_from_the_steps_before_and_not_from_evaluation() -> None:
    quantized = layer(RECIPES["fp8"])
    quantized.state.advance(0)
    quantized(torch.full((4, 64), 2.0, requires_grad=True))
    quantized.state.advance(1)
    with torch.no_grad():
        quantized(torch.full((4, 64), 1000.0))
    quantized(torch.full((4, 64), 3.0, requires_grad=True))
    assert quantized.amax_history[0, :3].tolist() == [3.0, 2.0, 0.0]


def test_under_autocast_a_product_is_rounded_once() -> None:
    """The float32 sum times both scales, to bfloat16; and the input counts as it is in bfloat16."""
    quantized = layer(RECIPES["nvfp4"])
    x = torch.randn(64, 64, generator=generator(1))
    with torch.autocast("cpu", torch.bfloat16):
        out = quantized(x)
    recipe = RECIPES["nvfp4"].forward
    assert recipe is not None
    a = nvfp4(x.bfloat16().float())
    b = nvfp4(quantized.weight.detach(), square=True)
    exact = (a.operand.double() @ b.operand.double().T) * (a.scale * b.scale).double()
    assert torch.equal(out, exact.float().bfloat16())


def test_a_forward_pass_redone_for_its_gradient_stops_before_the_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantized = layer(RECIPES["mxfp8"])
    calls = []
    original = QuantizedLinear.product

    def counted(self: QuantizedLinear, input: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return original(self, input)

    # Only its count shows that a product is left out: the gradients are the same.
    monkeypatch.setattr(QuantizedLinear, "product", counted)
    x = torch.randn(32, 64, generator=generator(1), requires_grad=True)
    recompute(lambda x: quantized(torch.nn.functional.silu(x)), x).sum().backward()
    assert len(calls) == 1
    redone, weight_gradient = x.grad, quantized.weight.grad
    x.grad = quantized.weight.grad = None
    quantized(torch.nn.functional.silu(x)).sum().backward()
    assert redone is not None and x.grad is not None and weight_gradient is not None
    assert torch.equal(redone, x.grad) and torch.equal(weight_gradient, quantized.weight.grad)


def test_the_forward_product_goes_to_bfloat16_for_the_last_part_of_training() -> None:
    recipe = find_recipe("nvfp4", "low_forward_share=0.8")
    assert recipe is not None
    quantized = layer(recipe)  # of 10 iterations
    x = torch.randn(32, 64, generator=generator(1))
    high = (x.bfloat16() @ quantized.weight.detach().bfloat16().T).float()
    quantized.state.advance(8)
    assert not torch.equal(quantized(x), high)
    quantized.state.advance(9)
    assert torch.equal(quantized(x), high)
