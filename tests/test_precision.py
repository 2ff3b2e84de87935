"""Low precision: formats against ml_dtypes, quantisers against TransformerEngine's own reference and
torchao's, products against float64, gradients against the straight-through expression.

The two references are used where they are installed (pip install --no-deps transformer-engine torchao);
their requirements are for GPUs.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import signal
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

import conformance
from conformance import generator
from conftest import TINY
from storylab.compiler import missing_for_compiling
from storylab.config import WIDE_DTYPES, Dtype, ModelConfig, TrainConfig
from storylab.errors import Interrupted, UserError
from storylab.model.recompute import recompute
from storylab.model.transformer import Transformer
from storylab.precision import fused as fusing
from storylab.precision.backends import te, torchao
from storylab.precision.backends.protocol import require_aligned
from storylab.precision.backends.te import require_te_version, te_arguments
from storylab.precision.backends.torchao import Torchao
from storylab.precision.convert import quantize_blocks
from storylab.precision.edit import find_recipe
from storylab.precision.formats import E4M3, E5M2, FORMATS, Format
from storylab.precision.linear import QuantizedLinear, product
from storylab.precision.quantize import (
    hadamard,
    mxfp8,
    nvfp4,
    per_row,
    per_tensor,
    random_bytes,
    tensor_amax,
)
from storylab.precision.recipes import (
    ALIASES,
    RECIPES,
    Operand,
    Recipe,
    block_of,
    layer_name,
    quantized_flops_fraction,
)
from storylab.precision.rounding import round_nearest, stochastic_round
from storylab.precision.scalings import SCALINGS, Scaling
from storylab.precision.selftest import check_layer, check_model, summarize
from storylab.precision.state import QuantizationState
from storylab.precision.stats import QuantizationStatistics
from storylab.record.folder import RunFolder
from storylab.record.schema import EvaluationRow, IterationRow, QuantizationRow
from storylab.training import run_progress
from storylab.training.precision import choose_precision
from storylab.training.resume import resume
from storylab.training.train import train

LOW = tuple(RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize("case", conformance.CASES)
def test_every_value_is_that_of_an_independent_implementation(case: str) -> None:
    """The table of docs/precision.md: formats, quantisers and products."""
    try:
        row = conformance.CASES[case]()
    except conformance.OracleMissingError as missing:
        pytest.skip(f"{missing} is not installed")
    assert row.values > 200_000 and row.mismatches <= row.allowed


# Formats


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_what_is_too_large_saturates_and_a_nan_stays(form: Format) -> None:
    x = torch.tensor([math.inf, -math.inf, 1e30, math.nan])
    rounded = round_nearest(x, form)
    assert rounded[:3].tolist() == [form.max, -form.max, form.max]
    assert rounded[3].isnan()


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_stochastic_rounding_gives_neighbours_and_keeps_the_mean(form: Format) -> None:
    try:
        values = torch.from_numpy(conformance.values_of(form))
    except conformance.OracleMissingError as missing:
        pytest.skip(f"{missing} is not installed")
    x = torch.empty(500).uniform_(-1, 1, generator=generator(0)) * form.max
    below = values[torch.searchsorted(values, x, right=True) - 1]
    above = values[torch.searchsorted(values, x).clamp(max=len(values) - 1)]
    draws = 4000
    random = random_bytes(torch.Size((draws, 500)), generator(1))
    rounded = stochastic_round(x.expand(draws, -1), form, random)
    assert ((rounded == below) | (rounded == above)).all()
    step = (above - below).clamp(min=1e-30)
    error = (rounded.mean(dim=0) - x) / step
    # Toward zero by at most 1/256 of a step, and five standard errors of a coin's mean.
    assert error.abs().max() < 1 / 256 + 5 * 0.5 / math.sqrt(draws)
    assert torch.equal(rounded, stochastic_round(x.expand(draws, -1), form, random))


def test_random_bytes_are_uniform_and_reproducible() -> None:
    drawn = random_bytes(torch.Size((256, 1001)), generator(3))
    assert torch.equal(drawn, random_bytes(torch.Size((256, 1001)), generator(3)))
    counts = torch.bincount(drawn.flatten(), minlength=256).double()
    expected = drawn.numel() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * math.sqrt(2 * 255)


# Quantisers


def test_a_tensors_scale_takes_it_to_the_formats_range() -> None:
    x = torch.randn(64, 64, generator=generator(0))
    quantized = per_tensor(x, E4M3)
    assert quantized.operand.abs().max() == 448.0
    assert (quantized.value - x).abs().max() < x.abs().max() * 2**-4
    assert torch.equal(per_tensor(torch.zeros(4, 4), E4M3).value, torch.zeros(4, 4))


@pytest.mark.parametrize("quantize", [lambda x: per_tensor(x, E4M3), mxfp8, nvfp4])
def test_operands_are_exact_in_bfloat16(quantize: Callable[[torch.Tensor], Any]) -> None:
    for x in conformance.tensors(128, 256):
        operand = quantize(x.float()).operand
        assert torch.equal(operand.bfloat16().float(), operand)


def test_four_over_six_errs_no_more_in_any_block() -> None:
    x = torch.randn(256, 512, generator=generator(0))
    plain, chosen = (nvfp4(x, four_over_six=use).value for use in (False, True))
    errors = [(y - x).abs().view(-1, 16).sum(dim=1) for y in (plain, chosen)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all() and errors[1].sum() < 0.99 * errors[0].sum()


def test_the_hadamard_transform_is_orthogonal_and_cancels_in_a_product() -> None:
    eye = torch.eye(16)
    turned = hadamard(eye).float()
    assert torch.equal(turned @ turned.T, eye)
    a, b = (torch.randint(-8, 9, (5, 64), generator=generator(i)).float() for i in (1, 2))
    # Small whole numbers over four stay exact in bfloat16.
    product_of_turned = hadamard(a).float() @ hadamard(b).float().T
    torch.testing.assert_close(product_of_turned, a @ b.T, rtol=0, atol=1e-4)


def test_products_are_those_of_float64() -> None:
    for quantize in (lambda x: per_tensor(x, E4M3), mxfp8, nvfp4):
        a, b = (quantize(torch.randn(64, 512, generator=generator(i))) for i in (1, 2))
        exact = (a.operand.double() @ b.operand.double().T) * (a.scale * b.scale).double()
        error = (product(a, b).double() - exact).abs().max() / exact.abs().max()
        assert error < 1e-6
    assert torch.get_float32_matmul_precision() == "highest"


# Layers


def layer(recipe: Recipe, seed: int = 0) -> QuantizedLinear:
    plain = nn.Linear(64, 96, bias=False)
    nn.init.normal_(plain.weight, generator=generator(seed))
    return QuantizedLinear(plain, recipe, QuantizationState(seed, max_iters=10), "layer")


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


def test_weights_are_quantised_anew_when_they_have_changed() -> None:
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


# Scalings


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_every_scaling_keeps_its_word(scaling: Scaling) -> None:
    """Values are elements of the format times the unit that the scaling states, within its range."""
    quantized = layer(RECIPES["fp8"])
    x = torch.randn(40, 70, generator=generator(3)) * 10.0 ** torch.arange(-2, 3).repeat(14)
    for form in scaling.formats:
        operand = Operand(form, scaling)
        found = quantized.quantize(x, operand, "input", "any")
        assert len(found.operand) == 40 and not found.operand[:, 70:].any()
        assert torch.equal(found.operand.bfloat16().float(), found.operand)
        value = found.value[:, :70]
        units = scaling.units(x, operand, found.scale)[:40, :70]
        elements = value / units
        torch.testing.assert_close(elements, round_nearest(elements, form), rtol=1e-6, atol=0)
        assert (value - x).norm() < 1.1 * form.rel_error_bound * x.norm()
        assert scaling.bytes_per_element(form) >= form.bits / 8
        assert set(scaling.options) <= {f.name for f in dataclasses.fields(Operand)}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_a_transposable_tensor_is_quantized_as_its_transpose(scaling: Scaling) -> None:
    quantized = layer(RECIPES["fp8"])
    x = torch.randn(64, 64, generator=generator(3)) * 10.0 ** torch.arange(-1, 1).repeat(32)
    for square in {False, "square" in scaling.options}:
        operand = Operand(scaling.formats[0], scaling, square=square)
        straight = quantized.quantize(x, operand, "input", "any").value
        turned = quantized.quantize(x.T.contiguous(), operand, "input", "any").value
        assert torch.equal(straight.T, turned) == operand.transposable


def test_bytes_of_an_element_count_its_share_of_the_scale() -> None:
    found = {name: recipe.bytes_per_element for name, recipe in RECIPES.items()}
    assert found["fp8"] == found["fp8-current"] == found["fp8-rowwise"] == 1.0
    assert found["mxfp8"] == 1 + 1 / 32 and found["nvfp4"] == 0.5 + 1 / 16


def test_a_layers_name_says_its_block() -> None:
    assert block_of(layer_name(11, "feed_forward.down")) == 11


# Recipes


def test_the_last_share_of_blocks_stays_high() -> None:
    assert RECIPES["nvfp4"].quantized_blocks(12) == range(10)
    assert RECIPES["fp8"].quantized_blocks(12) == range(12)
    first = dataclasses.replace(RECIPES["nvfp4"], high_first=1)
    assert first.quantized_blocks(12) == range(1, 10)


def test_a_recipe_is_changed_by_words() -> None:
    changed = find_recipe(
        "nvf4", "hadamard=false *.gradient.stochastic=false input_gradient=bfloat16"
    )
    assert changed is not None and not changed.hadamard and changed.input_gradient is None
    assert changed.weight_gradient is not None and not changed.weight_gradient[0].stochastic
    assert find_recipe("fp4") == RECIPES["nvfp4"] and find_recipe("bfloat16") is None
    flat = find_recipe("nvfp4", "*.weight.square=false high_last_share=0.5")
    assert flat is not None and flat.forward is not None and not flat.forward[1].square
    assert flat.quantized_blocks(4) == range(2)


@pytest.mark.parametrize(
    ("dtype", "changes", "message"),
    [
        ("bfloat16", "hadamard=false", "no recipe to change"),
        ("nvfp4", "hadamart=false", "perhaps you meant hadamard"),
        ("nvfp4", "hadamard=maybe", "use one of true, false"),
        ("nvfp4", "forward.weigth.square=false", "perhaps you meant weight"),
        ("nvfp4", "forward.gradient.square=false", "fits no operand"),
        ("nvfp4", "hadamard", "write FIELD=VALUE"),
        ("nvfp4", "high_last_share=2", "out of range"),
        ("fp8", "history=many", "must be a number"),
        ("nvfp4", "forward=fp8", "bfloat16 only"),
        ("mxfp8", "*.gradient.stochastic=true", "stochastic is for nvfp4 scaling"),
        ("fp8-current", "*.*.square=true", "square is for nvfp4 scaling"),
        ("fp8-current", "margin=3", "margin and history are for delayed"),
        ("fp8", "margin=1000000", "margin must be at most 64"),
        ("nvfp4", "*.*.format=e4m3", "for e2m1 elements"),
        ("mxfp8", "*.*.format=e2m1", "need nvfp4 scaling"),
        ("fp8", "history=0", "at least 1"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(dtype: str, changes: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_recipe(dtype, changes)


def test_a_model_keeps_its_weights_and_their_names() -> None:
    plain, low = Transformer(TINY, 50, seed=1), Transformer(TINY, 50, seed=1)
    quantize_blocks(low.blocks, RECIPES["nvfp4"], seed=1, max_iters=8)
    kinds = [type(block.attention.qkv).__name__ for block in low.blocks]
    assert kinds == ["QuantizedLinear", "Linear"]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), low.parameters(), strict=True))
    assert list(plain.state_dict()) == list(low.state_dict())


# Fused passes


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
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for x in list(conformance.tensors(128, 256))[:6]:
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
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    x = torch.randn(64, 64, generator=generator(1)) * 1e-6
    forms = [dataclasses.replace(E4M3, max=float(2**power)) for power in range(10)]
    for form in (E4M3, E5M2, *forms):
        for quantize in (per_tensor, mxfp8):
            monkeypatch.setattr(fusing, "FUSE_FROM", 0)
            ours = quantize(x, form).operand
            monkeypatch.setattr(fusing, "FUSE_FROM", math.inf)
            assert torch.equal(ours, quantize(x, form).operand)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= before + 2 * 12


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise torch._dynamo.exc.BackendCompilerFailed(broken, RuntimeError("no Python.h"), None)

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    monkeypatch.setattr(fusing, "FUSE_FROM", 0)
    doubled = fusing.fused(lambda x: 2 * x)
    assert doubled(torch.ones(2)).tolist() == doubled(torch.ones(2)).tolist() == [2.0, 2.0]


def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for one kind of arguments and wrong for another: each is found on its first tensor."""

    def miscompiled(values: torch.Tensor, form: str) -> torch.Tensor:
        return 2 * values + (form == "e5m2") * (values == 3.0)

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tensor_amax_is_found_in_one_pass(dtype: torch.dtype) -> None:
    for x in conformance.tensors(128, 256):
        assert tensor_amax(x.to(dtype)) == x.to(dtype).abs().max().float()
    assert tensor_amax(torch.tensor([1.0, math.nan])).isnan()


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


def test_what_happens_to_a_tensor_is_measured() -> None:
    quantized = layer(RECIPES["nvfp4"])
    statistics = QuantizationStatistics()
    x = torch.randn(64, 64, generator=generator(1))
    x[:, 16:32] *= 1e-6  # blocks that the tensor's and the block's scale cannot both reach
    x.requires_grad_()
    with quantized.state.observed(statistics):
        quantized(x).backward(torch.randn(64, 96, generator=generator(2)))
        with torch.no_grad():
            quantized(x)  # evaluation is not training
    rows = {(row["tensor"], row["product"]): row for row in statistics.rows()}
    assert set(rows) == {
        ("input", "forward"),
        ("weight", "forward"),
        ("gradient", "input_gradient"),
        ("gradient", "weight_gradient"),
        ("input", "weight_gradient"),
    }
    found = rows["input", "forward"]
    x = x.detach()
    value = nvfp4(x).value
    assert found["error"] == pytest.approx(float((value - x).norm() / x.norm()), rel=1e-5)
    assert found["underflow"] == pytest.approx(float((value == 0).float().mean()), abs=1e-6)
    assert found["underflow"] > 0.25 and found["scale_low"] < found["scale_high"]
    assert found["saturation"] < 0.1


# Hardware


def te_source(name: str) -> ast.Module:
    """A module of the real TransformerEngine, read and not run: it needs a GPU to be imported."""
    try:
        return ast.parse((conformance.te_folder() / name).read_text(encoding="utf-8"))
    except conformance.OracleMissingError as missing:
        pytest.skip(f"{missing} is not installed")


def definition(module: ast.AST, name: str) -> Any:
    return next(n for n in ast.walk(module) if getattr(n, "name", None) == name)


def arguments_of(module: ast.Module, name: str) -> set[str]:
    """Arguments that the constructor of a class takes."""
    init = definition(definition(module, name), "__init__")
    return {argument.arg for argument in (*init.args.args, *init.args.kwonlyargs)}


class EmulatedEngine:
    """Stands in for TransformerEngine: multiplies by our emulation and records what it is told."""

    def __init__(self, recipe: Recipe) -> None:
        self.emulated = recipe
        self.layers: list[dict[str, Any]] = []
        self.contexts: list[dict[str, Any]] = []
        self.inside = False

    def Linear(self, *sizes: int, **arguments: Any) -> nn.Module:  # noqa: N802
        self.layers.append(dict(zip(("in_features", "out_features"), sizes, strict=True)))
        self.layers[-1] |= arguments
        engine = self

        class Kernel(QuantizedLinear):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                assert engine.inside, "outside of te.autocast it would run in high precision"
                return super().forward(input)

        plain = nn.Linear(*sizes, bias=False)
        return Kernel(plain, self.emulated, QuantizationState(0, max_iters=8), "hardware")

    @contextmanager
    def autocast(self, **arguments: Any) -> Iterator[None]:
        self.contexts.append(arguments)
        self.inside = True
        yield
        self.inside = False


def stand_in(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, version: str = "2.20.2") -> Any:
    """Put a stand-in where TransformerEngine would be; recipes are recorded as name and arguments."""
    engine = EmulatedEngine(recipe)
    package: Any = types.ModuleType("transformer_engine")
    common: Any = types.ModuleType("transformer_engine.common")
    pytorch: Any = types.ModuleType("transformer_engine.pytorch")
    pytorch.Linear, pytorch.autocast = engine.Linear, engine.autocast
    recipes: Any = types.ModuleType("transformer_engine.common.recipe")
    for name in (
        "DelayedScaling",
        "Float8CurrentScaling",
        "MXFP8BlockScaling",
        "NVFP4BlockScaling",
    ):
        setattr(recipes, name, lambda _name=name, **arguments: (_name, arguments))
    package.common, package.pytorch, common.recipe = common, pytorch, recipes
    for module in (package, common, pytorch, recipes):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    return engine


B200, RTX_5090, RTX_4090, A100 = (10, 0), (12, 0), (8, 9), (8, 0)


@pytest.mark.parametrize(
    ("dtype", "changes", "name", "arguments"),
    [
        ("fp8", "margin=1 history=16", "DelayedScaling", {"margin": 1, "amax_history_len": 16}),
        ("fp8-current", "", "Float8CurrentScaling", {"use_power_2_scales": False}),
        ("mxfp8", "", "MXFP8BlockScaling", {"backward_override": None}),
        ("nvfp4", "", "NVFP4BlockScaling", {"disable_rht": False}),
        (
            "nvfp4",
            "hadamard=false high_last_share=0.5",
            "NVFP4BlockScaling",
            {"disable_rht": True, "disable_stochastic_rounding": False},
        ),
        (
            "nvfp4-plain",
            "",
            "NVFP4BlockScaling",
            {
                "disable_rht": True,
                "disable_stochastic_rounding": True,
                "disable_2d_quantization": False,
            },
        ),
        (
            "nvfp4",
            "input_gradient=bfloat16 weight_gradient=bfloat16",
            "NVFP4BlockScaling",
            {"backward_override": "high_precision"},
        ),
    ],
)
def test_a_recipe_in_transformer_engines_words(
    dtype: str, changes: str, name: str, arguments: dict[str, Any]
) -> None:
    """The arguments are those that the recipe means, and ones that the real class takes."""
    recipe = find_recipe(dtype, changes)
    assert recipe is not None
    found = te_arguments(recipe)
    assert found is not None and found[0] == name
    assert arguments.items() <= found[1].items()
    fields = {
        node.target.id
        for node in definition(te_source("common/recipe/__init__.py"), name).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert found[1].keys() <= fields
    from_environment = {
        node.target.id
        for node in definition(te_source("common/recipe/__init__.py"), name).body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.value is not None
        and "os.getenv" in ast.unparse(node.value)
    }
    # The details of a four-over-six that is off do not matter.
    assert from_environment - found[1].keys() <= {
        "nvfp4_4over6_e4m3_use_256",
        "nvfp4_4over6_err_mode",
    }


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        ("fp8", "input_gradient=bfloat16 weight_gradient=bfloat16"),
        ("nvfp4", "forward=bfloat16"),
        ("nvfp4", "forward.*.four_over_six=true"),
        ("nvfp4", "low_forward_share=0.8"),
        ("fp8-rowwise", ""),
        ("mxfp8", "*.*.format=e5m2"),
    ],
)
def test_what_transformer_engine_lacks_is_refused(
    dtype: str, changes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = find_recipe(dtype, changes)
    assert recipe is not None
    stand_in(monkeypatch, recipe)
    with pytest.raises(UserError, match=r"no such recipe.*--backend emulated"):
        te.load(recipe, "card", B200)


def test_transformer_engine_is_called_as_it_is_documented(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = RECIPES["nvfp4"]
    engine = stand_in(monkeypatch, recipe)
    # On a CPU blocks redo their forward pass; on a GPU they do not.
    monkeypatch.setattr("storylab.model.recompute.recomputes_activations", lambda x: False)
    backend = te.load(recipe, "card", B200)
    model = Transformer(TINY, 50, seed=1)
    reference = Transformer(TINY, 50, seed=1)
    state = quantize_blocks(model.blocks, recipe, 1, 8, backend)
    quantize_blocks(reference.blocks, recipe, 1, 8)
    assert list(model.state_dict()) == list(Transformer(TINY, 50).state_dict())
    assert len(list(model.parameters())) == len(list(reference.parameters()))
    tokens = torch.randint(50, (2, 17), generator=generator(1))
    with torch.autocast("cpu", torch.bfloat16), backend.context():
        loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert loss > 0 and all(p.grad is not None for p in model.parameters())
    with state.disabled(), torch.no_grad():  # high precision needs no context
        model(tokens[:, :-1], tokens[:, 1:])
    names = arguments_of(te_source("pytorch/module/linear.py"), "Linear")
    assert all(arguments.keys() <= names for arguments in engine.layers)
    first = reference.blocks[0].attention.qkv
    assert engine.layers[0]["in_features"] == first.in_features
    assert engine.layers[0]["out_features"] == first.out_features
    assert engine.layers[0]["bias"] is False
    names = arguments_of(te_source("pytorch/quantization.py"), "autocast")
    assert engine.contexts[0].keys() <= names
    assert engine.contexts[0]["recipe"][0] == "NVFP4BlockScaling"


@pytest.mark.parametrize(
    ("dtype", "capability", "message"),
    [
        ("fp8", A100, "no low precision to train in"),
        ("mxfp8", RTX_4090, "cannot train in MXFP8: it can train in FP8"),
        ("mxfp8", RTX_5090, "cannot train in MXFP8: it can train in FP8, NVFP4"),
        ("nvfp4", RTX_4090, "cannot train in NVFP4"),
        ("nvfp4", (9, 0), "cannot train in NVFP4"),
    ],
)
def test_what_a_card_cannot_do_is_said_before_the_run(
    dtype: str, capability: tuple[int, int], message: str
) -> None:
    for backend in (te, torchao):
        with pytest.raises(UserError, match=f"{message}.*emulated"):
            backend.load(RECIPES[dtype], "card", capability)


def test_old_versions_that_train_nvfp4_wrongly_on_geforce_are_refused() -> None:
    for version in ("2.13.0", "2.19.1"):
        with pytest.raises(UserError, match=r"2\.20 or later, use --dtype nvfp4-plain"):
            require_te_version(version, RECIPES["nvfp4"], RTX_5090)
        require_te_version(version, RECIPES["nvfp4-plain"], RTX_5090)
        require_te_version(version, RECIPES["nvfp4"], B200)
    require_te_version("2.20.2", RECIPES["nvfp4"], RTX_5090)


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


# Self-test


@pytest.mark.parametrize("dtype", RECIPES)
def test_the_self_test_counts_what_runs_low(dtype: str) -> None:
    recipe = dataclasses.replace(RECIPES[dtype], low_forward_share=0.5)
    model = Transformer(TINY, 50, seed=1)
    quantize_blocks(model.blocks, recipe, seed=1, max_iters=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = summarize(check_model(model.blocks, recipe, None))
    blocks = len(recipe.quantized_blocks(TINY.n_layer))
    assert found["products"] == found["low"] == blocks * 4 * 3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_product_left_in_bfloat16_is_not_counted() -> None:
    recipe = find_recipe("mxfp8", "weight_gradient=bfloat16")
    assert recipe is not None
    checks = list(check_layer("layer", torch.randn(96, 64), recipe, None))
    assert [check.low for check in checks] == [True, True, False]
    assert not any(check.failure for check in checks)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda y: y, "does not run in low precision"),
        (lambda y: y.detach() * 0 + y * 0, "is zero"),
        (lambda y: y * math.nan, "is not finite"),
        (lambda y: y + 0.1 * y.detach().abs().max() * torch.ones_like(y), "more than"),
    ],
)
def test_the_self_test_stops_what_does_not_do_as_it_says(
    broken: Callable[[torch.Tensor], torch.Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that computes in bfloat16 after all, gives zeros, NaN, or something else."""
    recipe = RECIPES["mxfp8"]
    engine = stand_in(monkeypatch, recipe)

    class Kernel(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return broken(super().forward(input))

    engine.Linear = lambda i, o, **_: Kernel(i, o, bias=False)
    backend = dataclasses.replace(te.load(recipe, "card", B200), library=engine)  # type: ignore[type-var]
    model = Transformer(TINY, 50, seed=1)
    quantize_blocks(model.blocks, recipe, 1, 8, backend)
    with pytest.raises(UserError, match=f"self-test failed: block 0.*{message}"):
        check_model(model.blocks, recipe, backend)


def test_an_error_of_the_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPES["mxfp8"]
    engine = stand_in(monkeypatch, recipe)

    class Kernel(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand a long tail")

    engine.Linear = lambda i, o, **_: Kernel(i, o, bias=False)
    backend = dataclasses.replace(te.load(recipe, "card", B200), library=engine)  # type: ignore[type-var]
    with pytest.raises(UserError, match=r"te says: CUBLAS_STATUS_NOT_SUPPORTED; try"):
        list(check_layer("layer", torch.randn(64, 64), recipe, backend))


def test_share_of_the_work_in_low_precision() -> None:
    """The record's model, by hand: FLOPs a token of one product, in millions."""
    model = ModelConfig()
    block = 2 * (768 * 768 * 2 + 2 * 768 * 192 + 3 * 768 * 2048) / 1e6
    head, attention = 2 * 768 * 50257 / 1e6, 12 * 4 * 768 * 64.5 / 1e6
    whole = 3 * (12 * block + head + attention)
    for name, blocks in (("fp8", 12), ("nvfp4", 10)):
        share = quantized_flops_fraction(RECIPES[name], model, 50257, 128)
        assert share == pytest.approx(3 * blocks * block / whole)
    for changes, products in (
        ("forward=bfloat16", 2),
        ("input_gradient=bfloat16 weight_gradient=bfloat16", 1),
        ("low_forward_share=0.8", 2.8),
    ):
        recipe = find_recipe("nvfp4", changes)
        assert recipe is not None
        share = quantized_flops_fraction(recipe, model, 50257, 128)
        assert share == pytest.approx(products * 10 * block / whole)


# Training


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW)
def test_a_low_precision_run_learns_and_resumes_to_the_same_bits(
    dtype: Any, tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    whole = train(tiny_config(dtype=dtype, out_dir=tmp_path / "whole"))
    summary = whole.read_summary()
    assert summary is not None and summary.validation is not None and summary.emulated
    first, last = whole.read_rows()[0].loss, whole.read_rows()[-1].loss
    assert last < first - 0.3
    # Evaluated in the same way for every arm, and in its own precision too.
    own = summary.validation_own_precision.loss
    assert own != summary.validation.loss and abs(own - summary.validation.loss) < 0.05
    short = train(
        tiny_config(dtype=dtype, out_dir=tmp_path / "short", max_iters=4, schedule="constant")
    )
    longer = dataclasses.replace(short.read_config(), max_iters=8)
    resumed = resume(short.folder, longer)
    straight = train(tiny_config(dtype=dtype, out_dir=tmp_path / "straight", schedule="constant"))

    def losses(run: RunFolder) -> list[float]:
        return [row.loss for row in run.read_rows() if isinstance(row, IterationRow)]

    assert losses(resumed) == losses(straight)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [6, 7, 11])
@pytest.mark.parametrize("dtype", ["fp8", "nvfp4"])
def test_a_run_stopped_within_an_iteration_resumes_to_the_same_bits(
    dtype: Any,
    calls: int,
    tiny_config: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Delayed scales have then been noted for half of the iteration's micro-batches."""
    split = {"dtype": dtype, "batch_size": 2, "gradient_accumulation_steps": 2, "max_iters": 6}
    split["recipe"] = "low_forward_share=0.5" if dtype == "nvfp4" else "history=2"
    straight = train(tiny_config(out_dir=tmp_path / "straight", **split))
    original, left = run_progress.StopSignal.check, iter(range(calls))

    def check(self: run_progress.StopSignal) -> None:
        if next(left, None) is None and self.number is None:
            self.number = signal.SIGTERM
        original(self)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(run_progress.StopSignal, "check", check)
        train(tiny_config(out_dir=tmp_path / "stopped", **split))
    resumed = resume(tmp_path / "stopped")

    def numbers(run: RunFolder) -> list[Any]:
        keys = ("loss", "train_loss", "val_loss")
        return [[getattr(row, key, None) for key in keys] for row in run.read_rows()]

    assert numbers(resumed) == numbers(straight)
    resumed_summary, straight_summary = resumed.read_summary(), straight.read_summary()
    assert resumed_summary is not None and straight_summary is not None
    for key in ("validation", "validation_own_precision"):
        assert getattr(resumed_summary, key) == getattr(straight_summary, key)


@pytest.mark.slow
def test_a_run_from_before_there_were_backends_was_emulated(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run = train(tiny_config(dtype="mxfp8", out_dir=tmp_path / "run", max_iters=1))
    values = json.loads((run.folder / "config.json").read_text())
    del values["backend"], values["quantization_stats"]
    (run.folder / "config.json").write_text(json.dumps(values))
    assert run.read_config().backend == "emulated"
    resume(run.folder)


def test_every_recipe_has_a_flag() -> None:
    assert {*RECIPES, *ALIASES, *WIDE_DTYPES} == set(get_args(Dtype))


def test_a_longer_run_may_not_move_the_switch_to_bfloat16(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    recipe = {"dtype": "nvfp4", "recipe": "low_forward_share=0.5", "schedule": "constant"}
    run = train(tiny_config(out_dir=tmp_path / "run", max_iters=2, **recipe))
    with pytest.raises(UserError, match="low_forward_share"):
        resume(run.folder, dataclasses.replace(run.read_config(), max_iters=4))


@pytest.mark.slow
def test_what_was_asked_of_every_tensor_is_in_the_metrics(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run = train(tiny_config(dtype="mxfp8", out_dir=tmp_path / "run", quantization_stats=True))
    rows = [row for row in run.read_rows() if isinstance(row, QuantizationRow)]
    evaluations = [row.iteration for row in run.read_rows() if isinstance(row, EvaluationRow)]
    products: dict[int, set[tuple[str, str]]] = {}
    for row in rows:
        products.setdefault(row.iteration, set()).add((row.tensor, row.product))
    assert sorted(products) == [0, *evaluations]
    # An evaluation just before takes nothing away from what training is seen to quantise.
    assert all(found == products[0] and len(found) == 6 for found in products.values())
    assert len({row.layer for row in rows}) == 4 * TINY.n_layer
    assert all(0 < row.error < 0.05 for row in rows if row.tensor != "gradient")
    assert (run.folder / "precision.json").exists()
    assert "self-test passed" in (run.folder / "log.txt").read_text()


@pytest.mark.slow
def test_arms_of_other_precisions_share_initial_weights(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    hashes = {
        train(tiny_config(dtype=dtype, out_dir=tmp_path / dtype, max_iters=1))
        .read_environment()
        .initial_weights_sha256
        for dtype in ("bfloat16", "fp8", "nvfp4")
    }
    assert len(hashes) == 1
