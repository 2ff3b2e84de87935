"""Low precision: formats against ml_dtypes, quantisers against TransformerEngine's own reference and
torchao's, products against float64, gradients against the straight-through expression.

The two references are used where they are installed (pip install --no-deps transformer-engine torchao);
their requirements are for GPUs.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import TINY
from storylab.config import TrainConfig
from storylab.errors import UserError
from storylab.model.transformer import Transformer
from storylab.precision.convert import quantize_blocks
from storylab.precision.formats import (
    E2M1,
    E4M3,
    FORMATS,
    Format,
    round_nearest,
    round_stochastic,
)
from storylab.precision.linear import QuantizationState, QuantizedLinear, product
from storylab.precision.quantize import hadamard, mxfp8, nvfp4, per_tensor, random_bytes
from storylab.precision.recipes import RECIPES, Recipe, find_recipe
from storylab.training.loop import train
from storylab.training.resume import resume
from storylab.training.run_folder import Run

LOW = ("fp8", "fp8-current", "mxfp8", "nvfp4")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Formats


def reference_type(form: Format) -> Any:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    names = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e2m1": "float4_e2m1fn"}
    return getattr(ml_dtypes, names[form.name])


def values_of(form: Format) -> np.ndarray:
    """Every finite value of a format, in order, as ml_dtypes has them."""
    codes = np.arange(16 if form is E2M1 else 256, dtype=np.uint8)
    values = codes.view(reference_type(form)).astype(np.float32)
    return np.unique(values[np.isfinite(values)])


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_rounding_is_that_of_ml_dtypes(form: Format) -> None:
    """On every value, every midpoint with its neighbours, and two million draws of all magnitudes."""
    values = values_of(form)
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    around = [np.nextafter(middles, np.float32(end)) for end in (math.inf, -math.inf)]
    rng = np.random.default_rng(0)
    draws = rng.standard_normal(2_000_000) * 10.0 ** rng.uniform(-10, 5, 2_000_000)
    x = np.concatenate((values, middles, *around, draws)).astype(np.float32)
    x = x.clip(-form.largest, form.largest)
    reference = x.astype(reference_type(form)).astype(np.float32)
    ours = round_nearest(torch.from_numpy(x), form).numpy()
    assert np.array_equal(ours, reference)
    assert np.array_equal(np.signbit(ours), np.signbit(reference))


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_what_is_too_large_saturates_and_a_nan_stays(form: Format) -> None:
    x = torch.tensor([math.inf, -math.inf, 1e30, math.nan])
    rounded = round_nearest(x, form)
    assert rounded[:3].tolist() == [form.largest, -form.largest, form.largest]
    assert rounded[3].isnan()


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_stochastic_rounding_gives_neighbours_and_keeps_the_mean(form: Format) -> None:
    values = torch.from_numpy(values_of(form))
    x = torch.empty(500).uniform_(-1, 1, generator=generator()) * form.largest
    below = values[torch.searchsorted(values, x, right=True) - 1]
    above = values[torch.searchsorted(values, x).clamp(max=len(values) - 1)]
    draws = 4000
    random = random_bytes(torch.Size((draws, 500)), generator(1))
    rounded = round_stochastic(x.expand(draws, -1), form, random)
    assert ((rounded == below) | (rounded == above)).all()
    step = (above - below).clamp(min=1e-30)
    error = (rounded.mean(dim=0) - x) / step
    # Toward zero by at most 1/256 of a step, and five standard errors of a coin's mean.
    assert error.abs().max() < 1 / 256 + 5 * 0.5 / math.sqrt(draws)
    assert torch.equal(rounded, round_stochastic(x.expand(draws, -1), form, random))


def test_random_bytes_are_uniform_and_reproducible() -> None:
    drawn = random_bytes(torch.Size((256, 1001)), generator(3))
    assert torch.equal(drawn, random_bytes(torch.Size((256, 1001)), generator(3)))
    counts = torch.bincount(drawn.flatten(), minlength=256).double()
    expected = drawn.numel() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * math.sqrt(2 * 255)


# Quantisers


def tensors() -> list[torch.Tensor]:
    """Magnitudes from tiny to huge, heavy tails, zeros and whole blocks of zeros, both dtypes."""
    found = []
    for scale in (1e-6, 1.0, 1e4):
        x = torch.randn(128, 256, generator=generator(5)) * scale
        tails = x * torch.randn(128, 256, generator=generator(6)).abs() ** 4
        holes = x * (torch.rand(128, 256, generator=generator(7)) < 0.1)
        holes[:16, :64] = 0
        found += [y.to(kind) for y in (x, tails, holes) for kind in (torch.float32, torch.bfloat16)]
    return [*found, torch.zeros(32, 64)]


@pytest.fixture(scope="module")
def transformer_engine() -> Any:
    """TransformerEngine's reference quantiser in Python, with what needs a GPU stubbed."""
    try:
        root = importlib.util.find_spec("transformer_engine")
    except (ImportError, RuntimeError):
        root = None
    if root is None or not root.submodule_search_locations:
        pytest.skip("transformer-engine is not installed")
    folder = Path(root.submodule_search_locations[0]) / "pytorch/custom_recipes"
    prefix = "transformer_engine.pytorch.custom_recipes"
    for name in ("transformer_engine", "transformer_engine.pytorch", prefix):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    tensor: Any = types.ModuleType("transformer_engine.pytorch.quantized_tensor")
    tensor.QuantizedTensorStorage = tensor.Quantizer = type("Stub", (), {})
    gemm: Any = types.ModuleType(f"{prefix}.gemm")
    gemm.GEMMType = enum.Enum("GEMMType", "FPROP DGRAD WGRAD")
    gemm.MMParams = object
    sys.modules |= {tensor.__name__: tensor, gemm.__name__: gemm}
    sys.modules[prefix].gemm = gemm  # type: ignore[attr-defined]
    for name in ("reference_utils", "reference_nvfp4"):
        spec = importlib.util.spec_from_file_location(f"{prefix}.{name}", folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[f"{prefix}.{name}"] = module
        setattr(sys.modules[prefix], name, module)
        spec.loader.exec_module(module)
    yield sys.modules[f"{prefix}.reference_nvfp4"]
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        del sys.modules[name]


@pytest.mark.parametrize("square", [False, True])
def test_nvfp4_is_that_of_transformer_engine(transformer_engine: Any, square: bool) -> None:
    for x in tensors():
        codes, scales = transformer_engine.NVFP4QuantizerRef._quantize_blockwise_reference(
            x, x.abs().max().float(), 16, 16 if square else 1, pow_2_scales=False, eps=0.0
        )
        elements = transformer_engine.cast_from_fp4x2(codes, torch.float32)
        rows, columns = x.shape
        theirs = elements.view(rows, -1, 16) * scales.float().view(rows, -1, 1)
        ours = nvfp4(x.float(), square=square).operand
        assert torch.equal(ours, theirs.view(rows, columns))


def test_mxfp8_is_that_of_torchao() -> None:
    config = pytest.importorskip("torchao.prototype.mx_formats.config", reason="no torchao")
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    for x in tensors()[:-1]:  # of zeros alone torchao makes NaN scales
        for form, kind in ((E4M3, torch.float8_e4m3fn),):
            theirs = MXTensor.to_mx(
                x, kind, 32, scaling_mode=config.ScaleCalculationMode.RCEIL
            ).dequantize(torch.float32)
            assert torch.equal(mxfp8(x.float(), form).value, theirs)


def test_a_tensors_scale_takes_it_to_the_formats_range() -> None:
    x = torch.randn(64, 64, generator=generator())
    quantized = per_tensor(x, E4M3)
    assert quantized.operand.abs().max() == 448.0
    assert (quantized.value - x).abs().max() < x.abs().max() * 2**-4
    assert torch.equal(per_tensor(torch.zeros(4, 4), E4M3).value, torch.zeros(4, 4))


@pytest.mark.parametrize("quantize", [lambda x: per_tensor(x, E4M3), mxfp8, nvfp4])
def test_operands_are_exact_in_bfloat16(quantize: Callable[[torch.Tensor], Any]) -> None:
    for x in tensors():
        operand = quantize(x.float()).operand
        assert torch.equal(operand.bfloat16().float(), operand)


def test_four_over_six_errs_no_more_in_any_block() -> None:
    x = torch.randn(256, 512, generator=generator())
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


@pytest.mark.parametrize("name", ["fp8-current", "mxfp8", "nvfp4"])
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


# Recipes


def test_the_last_share_of_blocks_stays_high() -> None:
    assert RECIPES["nvfp4"].low_blocks(12) == range(10)
    assert RECIPES["fp8"].low_blocks(12) == range(12)
    first = dataclasses.replace(RECIPES["nvfp4"], high_first=1)
    assert first.low_blocks(12) == range(1, 10)


def test_a_recipe_is_changed_by_words() -> None:
    changed = find_recipe(
        "nvf4", "hadamard=false *.gradient.stochastic=false input_gradient=bfloat16"
    )
    assert changed is not None and not changed.hadamard and changed.input_gradient is None
    assert changed.weight_gradient is not None and not changed.weight_gradient[0].stochastic
    assert find_recipe("fp4") == RECIPES["nvfp4"] and find_recipe("bfloat16") is None
    flat = find_recipe("nvfp4", "*.weight.square=false high_last_share=0.5")
    assert flat is not None and flat.forward is not None and not flat.forward[1].square
    assert flat.low_blocks(4) == range(2)


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


# Training


@pytest.mark.parametrize("dtype", LOW)
def test_a_low_precision_run_learns_and_resumes_to_the_same_bits(
    dtype: Any, tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    whole = train(tiny_config(dtype=dtype, out_dir=tmp_path / "whole"))
    summary = whole.summary
    assert summary is not None and summary["emulated"]
    first, last = whole.metrics[0]["loss"], whole.metrics[-1]["loss"]
    assert last < first - 0.3
    # Evaluated alike for every arm, and in its own precision too.
    own = summary["validation_own_precision"]["loss"]
    assert own != summary["validation"]["loss"] and abs(own - summary["validation"]["loss"]) < 0.05
    short = train(
        tiny_config(dtype=dtype, out_dir=tmp_path / "short", max_iters=4, schedule="constant")
    )
    longer = dataclasses.replace(short.config, max_iters=8)
    resumed = resume(short.folder, longer)
    straight = train(tiny_config(dtype=dtype, out_dir=tmp_path / "straight", schedule="constant"))

    def losses(run: Run) -> list[float]:
        return [row["loss"] for row in run.metrics if row["kind"] == "iteration"]

    assert losses(resumed) == losses(straight)


def test_arms_of_other_precisions_share_initial_weights(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    hashes = {
        train(tiny_config(dtype=dtype, out_dir=tmp_path / dtype, max_iters=1)).environment[
            "initial_weights_sha256"
        ]
        for dtype in ("bfloat16", "fp8", "nvfp4")
    }
    assert len(hashes) == 1
