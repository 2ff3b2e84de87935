"""torch's own FP8 products: on a CPU against the emulation, their layouts on fake CUDA tensors."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from conformance import generator
from engine_stand_in import A100, B200, RTX_4090, RTX_5090
from storylab.config import TrainConfig
from storylab.errors import UserError
from storylab.precision.backends import BACKENDS, native, resolve_backend, te
from storylab.precision.edit import find_recipe
from storylab.precision.quantize import per_row, per_tensor
from storylab.precision.recipes import RECIPES, Operand, Recipe
from storylab.precision.scaled_linear import ScaledProducts, scaled, scaled_product
from storylab.precision.selftest import check_layer
from storylab.training.precision import ComputePolicy
from storylab.training.setup import resolve_compile

H100 = (9, 0)
CURRENT, ROWWISE = RECIPES["fp8-current"], RECIPES["fp8-rowwise"]
BY_NAME = pytest.mark.parametrize("recipe", [CURRENT, ROWWISE], ids=["current", "rowwise"])


def operands(recipe: Recipe) -> set[Operand]:
    return set(recipe.operands)


def hard_tensor(dtype: torch.dtype) -> Tensor:
    """Values from 1e-6 to 1e4, a row of zeros, and one of values that nearly vanish."""
    draws = torch.randn(32, 48, generator=generator(3))
    values = draws * 10 ** torch.linspace(-6, 4, 48)
    values[3], values[4] = 0, values[4] * 1e-30
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BY_NAME
def test_elements_and_scales_are_those_of_the_emulation(recipe: Recipe, dtype: torch.dtype) -> None:
    values = hard_tensor(dtype)
    for operand in operands(recipe):
        quantize = per_tensor if operand.scaling.per_tensor else per_row
        for tensor in (values, torch.zeros_like(values)):
            wanted, ours = quantize(tensor, operand.format), scaled(tensor, operand)
            assert torch.equal(ours.elements.float(), wanted.operand)
            assert torch.equal(ours.scale, wanted.scale)


@pytest.mark.parametrize("shape", [(96, 64), (50, 36)], ids=["multiples of 16", "others"])
@BY_NAME
def test_all_three_products_are_those_of_the_emulation(
    recipe: Recipe, shape: tuple[int, int]
) -> None:
    """Within the order of a sum, and within bfloat16 for the weight gradient of rows."""
    backend = native.load(recipe, "card", RTX_4090)
    weight = torch.randn(shape, generator=generator(1))
    checks = list(check_layer("layer", weight, recipe, backend))
    for check in checks:
        assert check.low and check.failure is None and check.deviation is not None
        in_bfloat16 = recipe is ROWWISE and check.product == "weight_gradient"
        assert check.deviation < (0.002 if in_bfloat16 else 1e-4)
    assert len(checks) == 3


@BY_NAME
def test_a_product_is_that_of_its_elements_in_float64(recipe: Recipe) -> None:
    assert recipe.forward is not None
    left_operand, right_operand = recipe.forward
    left = scaled(torch.randn(20, 100, generator=generator(5)), left_operand)
    right = scaled(torch.randn(7, 100, generator=generator(6)), right_operand)
    exact = (left.elements.double() * left.scale) @ (right.elements.double() * right.scale).T
    assert torch.equal(scaled_product(left, right, torch.bfloat16), exact.bfloat16())


@pytest.mark.parametrize(
    "changes",
    ["forward=bfloat16", "input_gradient=bfloat16", "weight_gradient=bfloat16"],
)
@BY_NAME
def test_a_product_can_stay_in_bfloat16(recipe: Recipe, changes: str) -> None:
    name = next(name for name, found in RECIPES.items() if found is recipe)
    changed = find_recipe(name, changes)
    assert changed is not None
    weight = torch.randn(32, 64, generator=generator(1))
    checks = list(check_layer("layer", weight, changed, native.load(changed, "card", H100)))
    assert [check.low for check in checks].count(False) == 1
    assert all(check.failure is None for check in checks)


@pytest.mark.parametrize(
    ("name", "changes", "can"),
    [
        ("fp8-current", "", True),
        ("fp8-rowwise", "high_first=1", True),
        ("fp8-current", "*.*.format=e4m3", True),
        ("fp8-current", "*.*.format=e5m2", False),
        ("fp8-current", "*.weight.scaling=row", False),
        ("fp8-current", "low_forward_share=0.9", False),
        ("fp8", "", False),
        ("mxfp8", "", False),
        ("nvfp4", "", False),
    ],
)
def test_recipes_that_torch_multiplies(name: str, changes: str, can: bool) -> None:
    recipe = find_recipe(name, changes)
    assert recipe is not None and native.computes(recipe) == can
    if not can:
        with pytest.raises(UserError, match=r"fp8-current or fp8-rowwise, or run it emulated"):
            native.load(recipe, "card", B200)


def test_a_gpu_without_fp8_is_refused_and_newer_ones_are_not() -> None:
    with pytest.raises(UserError, match=r"no low precision to train in.*emulated"):
        native.load(CURRENT, "A100", A100)
    for capability in (RTX_4090, H100, B200, (10, 3), RTX_5090):
        assert native.load(CURRENT, "card", capability).name == "native"


def test_native_is_chosen_by_name_alone() -> None:
    """auto stays TransformerEngine, which is asked first and is not replaced where it is missing."""
    with pytest.raises(UserError, match="native needs an NVIDIA GPU"):
        resolve_backend(torch.device("cpu"), CURRENT, "native")
    assert BACKENDS["native"] is native
    with pytest.raises(UserError, match="no such recipe: use --backend native"):
        te.load(ROWWISE, "card", B200)


def test_layers_that_torch_compile_takes_may_be_compiled() -> None:
    config = TrainConfig(dtype="fp8-current", compile=True)
    cuda = torch.device("cuda")
    backend = native.load(CURRENT, "card", H100)
    by_native = ComputePolicy(cuda, torch.bfloat16, CURRENT, backend)
    by_other = dataclasses.replace(by_native, hardware=dataclasses.replace(backend, compiles=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storylab.training.setup.missing_for_compiling", lambda device: None)
        assert resolve_compile(config, by_native)
        assert not resolve_compile(dataclasses.replace(config, compile=None), by_native)
        for policy in (by_other, dataclasses.replace(by_native, hardware=None)):
            with pytest.raises(UserError, match="--compile is not for fp8-current with --backend"):
                resolve_compile(config, policy)


def passes(layer: nn.Module, weight: Tensor, input: Tensor) -> list[Tensor]:
    """Output and both gradients, for a gradient of a line of values."""
    input.grad = weight.grad = None
    with torch.autocast(input.device.type, torch.bfloat16):
        output: Tensor = layer(input)
    output.backward(torch.linspace(-1, 1, output.shape[-1], device=input.device).expand_as(output))
    assert input.grad is not None and weight.grad is not None
    return [output.detach(), input.grad, weight.grad]


# The compiler looks at both.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@BY_NAME
def test_a_layer_is_one_graph_and_compiled_gives_the_same(recipe: Recipe) -> None:
    plain = nn.Linear(36, 50, bias=False)
    layer = native.load(recipe, "card", H100).layer(plain)
    input = torch.randn(3, 7, 36, generator=generator(2)).bfloat16().requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    ours, theirs = (passes(each, plain.weight, input) for each in (layer, compiled))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [tensor.dtype for tensor in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("tokens", [128, 13])
@pytest.mark.parametrize("shape", [(96, 64), (50, 36)], ids=["multiples of 16", "others"])
@BY_NAME
def test_operands_have_the_layout_that_a_gpu_takes(
    recipe: Recipe,
    shape: tuple[int, int],
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch checks rows, columns and multiples of 16 of a fake CUDA tensor as it does those of a real one;
    the scales are checked here."""
    product = Mock(wraps=torch._scaled_mm)
    monkeypatch.setattr(torch, "_scaled_mm", product)
    with FakeTensorMode():
        weight = torch.empty(shape, device="cuda")
        input = torch.empty(2, tokens, shape[1], device="cuda", dtype=torch.bfloat16)
        # Its parts by hand: autograd would look for the card.
        context = SimpleNamespace(save_for_backward=Mock(), saved_tensors=(input, weight))
        output = ScaledProducts.forward(context, input, weight, recipe)
        found = [output, *ScaledProducts.backward(context, output)[:2]]
        assert [f.shape for f in found if f is not None] == [
            (2, tokens, shape[0]),
            input.shape,
            shape,
        ]
    assert all(f is not None and f.device.type == "cuda" for f in found)
    assert [call.kwargs["use_fast_accum"] for call in product.call_args_list] == [
        True,
        False,
        False,
    ]
    for call in product.call_args_list:
        (left, right), scales = call.args, (call.kwargs["scale_a"], call.kwargs["scale_b"])
        assert {left.dtype, right.dtype} != {torch.float8_e5m2}
        by_row = ((len(left), 1), (1, right.shape[1])) if recipe is ROWWISE else ((), ())
        assert tuple(scale.shape for scale in scales) == by_row
        assert all(scale.is_contiguous() and scale.dtype == torch.float32 for scale in scales)
