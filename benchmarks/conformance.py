"""Hold the emulated formats, quantisers and products against independent ones, value by value.

Prints the table of docs/precision.md; the tests assert that it has no mismatch where none is allowed:

    pip install ml_dtypes && pip install --no-deps torchao transformer-engine
    python benchmarks/conformance.py
"""

from __future__ import annotations

import enum
import importlib.metadata
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storylab.precision.formats import E2M1, E4M3, E5M2, FORMATS, Format
from storylab.precision.linear import product
from storylab.precision.quantize import (
    Quantized,
    hadamard,
    mxfp8,
    nvfp4,
    per_row,
    per_tensor,
)
from storylab.precision.rounding import round_nearest


class OracleMissingError(Exception):
    """The package to compare with is not installed."""


@dataclass(frozen=True)
class Row:
    """How many of our values were compared with an oracle's, and how many differ."""

    what: str
    oracle: str
    values: int
    mismatches: int
    note: str = ""
    allowed: int = 0
    """As many mismatches are no fault."""


def generator(seed: int) -> torch.Generator:
    """A generator of the seed."""
    return torch.Generator().manual_seed(seed)


def tensors(rows: int = 512, columns: int = 512) -> Iterator[Tensor]:
    """Magnitudes from tiny to huge, heavy tails, zeros and whole blocks of zeros, float32 and
    bfloat16; last a tensor of zeros."""
    for scale in (1e-6, 1.0, 1e4):
        x = torch.randn(rows, columns, generator=generator(5)) * scale
        tails = x * torch.randn(rows, columns, generator=generator(6)).abs() ** 4
        holes = x * (torch.rand(rows, columns, generator=generator(7)) < 0.1)
        holes[:16, :64] = 0
        for y in (x, tails, holes):
            yield y
            yield y.bfloat16()
    yield torch.zeros(rows, columns)


def extremes(rows: int = 512, columns: int = 512) -> Iterator[Tensor]:
    """Subnormal numbers, nearly the largest, an infinity and a NaN."""
    draws = torch.randn(rows, columns, generator=generator(8))
    yield draws * 1e-42
    yield draws.clamp(-1, 1) * 3e38
    for value in (math.inf, math.nan):
        odd = draws.clone()
        odd[0, 0] = value
        yield odd


def reference_type(form: Format) -> Any:
    """The format's type in ml_dtypes."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise OracleMissingError("ml_dtypes") from error
    names = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e2m1": "float4_e2m1fn"}
    return getattr(ml_dtypes, names[form.name])


def values_of(form: Format) -> np.ndarray:
    """Every finite value of a format, in order, as ml_dtypes has them."""
    codes = np.arange(16 if form is E2M1 else 256, dtype=np.uint8)
    values = codes.view(reference_type(form)).astype(np.float32)
    return np.unique(values[np.isfinite(values)])


def rounding(form: Format) -> Row:
    """Every value, every midpoint with its neighbours, and two million draws of all magnitudes."""
    values = values_of(form)
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    around = [np.nextafter(middles, np.float32(end)) for end in (math.inf, -math.inf)]
    rng = np.random.default_rng(0)
    draws = rng.standard_normal(2_000_000) * 10.0 ** rng.uniform(-10, 5, 2_000_000)
    x = np.concatenate((values, middles, *around, draws)).astype(np.float32)
    x = x.clip(-form.max, form.max)
    theirs = x.astype(reference_type(form)).astype(np.float32)
    ours = round_nearest(torch.from_numpy(x), form).numpy()
    wrong = (ours != theirs) | (np.signbit(ours) != np.signbit(theirs))
    return Row(f"rounding to {form.name.upper()}", "ml_dtypes", x.size, int(wrong.sum()))


def te_folder() -> Path:
    """Where TransformerEngine is installed; found without importing it, as that takes a GPU."""
    try:
        distribution = importlib.metadata.distribution("transformer-engine")
    except importlib.metadata.PackageNotFoundError as error:
        raise OracleMissingError("transformer-engine") from error
    return Path(str(distribution.locate_file("transformer_engine")))


@contextmanager
def te_reference() -> Iterator[Any]:
    """TransformerEngine's reference quantiser in Python, with what needs a GPU stubbed."""
    folder = te_folder() / "pytorch/custom_recipes"
    prefix = "transformer_engine.pytorch.custom_recipes"
    before = {name: module for name, module in sys.modules.items() if "transformer_engine" in name}
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
    try:
        for name in ("reference_utils", "reference_nvfp4"):
            path = folder / f"{name}.py"
            spec = importlib.util.spec_from_file_location(f"{prefix}.{name}", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[f"{prefix}.{name}"] = module
            setattr(sys.modules[prefix], name, module)
            spec.loader.exec_module(module)
        yield sys.modules[f"{prefix}.reference_nvfp4"]
    finally:
        for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
            del sys.modules[name]
        sys.modules.update(before)


def nvfp4_of_transformer_engine(square: bool, four_over_six: bool = False) -> Row:
    """Codes times block scales. Four over six with the tensor's scale as it is without."""
    options = {"nvfp4_use_4over6": True, "nvfp4_e4m3_max": 448} if four_over_six else {}
    count = wrong = 0
    with te_reference() as reference:
        for x in (*tensors(), *([] if four_over_six else extremes())):
            codes, scales = reference.NVFP4QuantizerRef._quantize_blockwise_reference(
                x,
                x.abs().max().float(),
                16,
                16 if square else 1,
                pow_2_scales=False,
                eps=0.0,
                **options,
            )
            elements = reference.cast_from_fp4x2(codes, torch.float32)
            rows = len(x)
            theirs = elements.view(rows, -1, 16) * scales.float().view(rows, -1, 1)
            theirs = theirs.view(x.shape)
            ours = nvfp4(x, square=square, four_over_six=four_over_six).operand
            differs = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
            count, wrong = count + x.numel(), wrong + int(differs.sum())
    shape = "16 x 16" if square else "1 x 16"
    oracle, name = "TransformerEngine's Python reference", f"NVFP4, blocks of {shape}"
    if not four_over_six:
        return Row(name, oracle, count, wrong)
    note = "where four and six err equally, the order of a sum decides"
    return Row(f"{name}, four over six", oracle, count, wrong, note, allowed=count // 1000)


def hadamard_of_transformer_engine() -> Row:
    """The random Hadamard transform of 16 values, rounded to bfloat16."""
    count = wrong = 0
    with te_reference() as reference:
        build = reference.NVFP4QuantizerRef._build_hadamard_matrix
        for x in tensors():
            values = x.bfloat16()
            theirs = values.view(-1, 16) @ (build(16, x.device, values.dtype, True) / 4)
            count = count + x.numel()
            wrong += int((hadamard(values) != theirs.view(x.shape)).sum())
    return Row("Hadamard transform", "TransformerEngine's Python reference", count, wrong)


def mxfp8_of_torchao(form: Format, kind: torch.dtype) -> Row:
    """Blocks of 32, scale exponents rounded up."""
    try:
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
    except ImportError as error:
        raise OracleMissingError("torchao") from error
    count = wrong = 0
    for x in list(tensors())[:-1]:  # of zeros alone torchao makes NaN scales
        theirs = MXTensor.to_mx(x, kind, 32, scaling_mode=ScaleCalculationMode.RCEIL)
        differs = mxfp8(x, form).value != theirs.dequantize(torch.float32)
        count, wrong = count + x.numel(), wrong + int(differs.sum())
    return Row(f"MXFP8, {form.name.upper()}", "torchao, RCEIL", count, wrong)


def float8_of_torchao(by_row: bool) -> Row:
    """E4M3 with one scale for the tensor, or one power of two for each row."""
    try:
        from torchao.float8.config import ScalingGranularity
        from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
        from torchao.float8.float8_training_tensor import LinearMMConfig
    except ImportError as error:
        raise OracleMissingError("torchao") from error
    kind = ScalingGranularity.AXISWISE if by_row else ScalingGranularity.TENSORWISE
    count = wrong = 0
    for x in list(tensors())[:-1]:
        theirs = hp_tensor_to_float8_dynamic(
            x,
            torch.float8_e4m3fn,
            LinearMMConfig(),
            scaling_granularity=kind,
            axiswise_dim=-1 if by_row else None,
            round_scales_to_power_of_2=by_row,
        )
        ours = per_row(x, E4M3) if by_row else per_tensor(x, E4M3)
        differs = ours.operand != theirs._data.float()
        count, wrong = count + x.numel(), wrong + int(differs.sum())
    name = "each row" if by_row else "the tensor"
    return Row(f"FP8, one scale for {name}", "torchao's float8 training", count, wrong)


def products(name: str, quantize: Callable[[Tensor], Quantized]) -> Row:
    """Count the elements of a product that differ from the float64 one by more than float32's rounding of
    K sums, in any order of adding. Also check whether the bfloat16 units change it at all."""
    a, b = (quantize(torch.randn(512, 4096, generator=generator(i))) for i in (1, 2))
    exact = a.operand.double() @ b.operand.double().T * a.scale.double() * b.scale.double()
    ours = product(a, b)
    plain = (a.operand @ b.operand.T) * (a.scale * b.scale)
    bound = 2**-22 * (a.operand.abs().double() @ b.operand.abs().double().T)
    bound = bound * a.scale.double() * b.scale.double()
    wrong = int(((ours.double() - exact).abs() > bound).sum())
    same = float((ours == plain).double().mean())
    note = f"{same:.2%} the same bits as a float32 product"
    return Row(f"product of {name}", "float64", ours.numel(), wrong, note)


CASES: dict[str, Callable[[], Row]] = {
    **{f"rounding {form.name}": lambda form=form: rounding(form) for form in FORMATS.values()},
    "NVFP4": lambda: nvfp4_of_transformer_engine(square=False),
    "NVFP4 square": lambda: nvfp4_of_transformer_engine(square=True),
    "four over six": lambda: nvfp4_of_transformer_engine(square=False, four_over_six=True),
    "Hadamard": hadamard_of_transformer_engine,
    "MXFP8 E4M3": lambda: mxfp8_of_torchao(E4M3, torch.float8_e4m3fn),
    "MXFP8 E5M2": lambda: mxfp8_of_torchao(E5M2, torch.float8_e5m2),
    "FP8": lambda: float8_of_torchao(by_row=False),
    "FP8 by row": lambda: float8_of_torchao(by_row=True),
    "NVFP4 product": lambda: products("NVFP4", nvfp4),
    "MXFP8 product": lambda: products("MXFP8", mxfp8),
    "FP8 product": lambda: products("FP8", lambda x: per_tensor(x, E4M3)),
}


def main() -> None:
    """Print the table."""
    print("| ours | compared with | values | mismatches | |")
    print("| --- | --- | --- | --- | --- |")
    for name, case in CASES.items():
        try:
            row = case()
        except OracleMissingError as missing:
            print(f"| {name} | {missing} is not installed | | | |", flush=True)
            continue
        cells = (row.what, row.oracle, f"{row.values:,}", f"{row.mismatches:,}", row.note)
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
