"""Examines this machine: devices, precisions, and speeds measured on real training steps."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Iterator, Sequence

import psutil
import torch

from storylab.compiler import missing_for_compiling, processor_flags
from storylab.config import PRESETS, Backend, Dtype, PresetName, TrainConfig, preset_config
from storylab.documents.doctor import (
    CudaDevice,
    DoctorDocument,
    Machine,
    ProductError,
    ProductSpeed,
    RecipeCheck,
    TrainingSpeed,
)
from storylab.errors import UserError
from storylab.precision.backends import resolve_backend
from storylab.precision.features import device_features
from storylab.precision.recipes import RECIPES
from storylab.precision.selftest import check_layer
from storylab.training.cores import SOME_CORES, CoreUse
from storylab.training.log_format import format_duration
from storylab.training.measure import StepTimer, product_rate
from storylab.training.precision import choose_device, choose_precision

RECORD_TOKENS = 1001 * TrainConfig().tokens_per_iteration
MATRIX = (2048, 768, 2048)
# So large that a GPU is not done before the host has started the next product.
CUDA_MATRIX = (8192, 8192, 8192)
# On a GPU 16-bit products are about as fast as each other, and bfloat16 needs no loss scale.
PREFERENCE_ON_CUDA = 1.1
# Seconds of steps on a GPU, for its clock to settle; on a CPU two steps take that long.
CUDA_SECONDS = 1.0
TEST_LAYER = (2048, 768)
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")


def examination(
    device_name: str, presets: Sequence[PresetName], precision: bool = False
) -> DoctorDocument:
    """Everything that :func:`examine` finds, or :func:`examine_precision` with ``precision``.

    Raises:
        UserError: there is no such device.
    """
    device = choose_device(device_name)
    machine = describe_machine(device)
    products = training = recipes = None
    if precision:
        recipes = list(recipe_checks(device))
    else:
        products = list(product_speeds(device))
        training = list(training_speeds(device, fastest(products, device), presets))
    return DoctorDocument(
        device=str(device), machine=machine, products=products, training=training, recipes=recipes
    )


def examine(device_name: str, presets: Sequence[PresetName]) -> Iterator[str]:
    """Lines that describe the machine, then measured speeds, as they become known.

    Args:
        device_name: auto, cpu, cuda or mps.
        presets: models to time a few micro-batches of.

    Raises:
        UserError: there is no such device.
    """
    device = choose_device(device_name)
    yield from _machine_lines(describe_machine(device), device)
    yield ""
    rows, inner, columns = matrix_for(device)
    yield f"matrix products on {device} (rows {rows}, {inner} to {columns} columns):"
    products = []
    for product in product_speeds(device):
        yield _product_line(product)
        products.append(product)
    best = fastest(products, device)
    yield f"fastest: --dtype {best}"
    yield ""
    yield f"training steps in {best}, uncompiled (a few micro-batches each, so expect 20 % either way):"
    yield from map(_training_line, training_speeds(device, best, presets))


def examine_precision(device_name: str) -> Iterator[str]:
    """Lines of the precision self-test: each recipe with each backend on a layer of normal draws.

    A line has the relative errors of the layer's three products, or the reason why the recipe cannot run.

    Raises:
        UserError: there is no such device.
    """
    device = choose_device(device_name)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        yield (
            f"{torch.cuda.get_device_name(device)}, compute capability "
            f"{capability[0]}.{capability[1]}: {', '.join(device_features(capability)) or 'nothing'} "
            "below 16 bits in hardware"
        )
    else:
        yield f"{device}: low precision is emulated here; the hardware of no CPU computes it"
    yield f"{'dtype':<12} {'backend':<9} {'forward':>8} {'dx':>8} {'dW':>8}   relative errors"
    yield from map(_recipe_line, recipe_checks(device))


def describe_machine(device: torch.device) -> Machine:
    """Versions, CPU, memory, disk and CUDA devices; and what compiling for ``device`` lacks."""
    memory = psutil.virtual_memory()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = [torch.cuda.get_device_properties(i) for i in range(count)]
    return Machine(
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        cpu_instructions=torch.backends.cpu.get_cpu_capability(),
        bfloat16_units=_matrix_units(),
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        free_disk_bytes=shutil.disk_usage(".").free,
        missing_for_compiling=missing_for_compiling(device.type),
        cuda=[
            CudaDevice(
                name=card.name,
                memory_bytes=card.total_memory,
                compute_capability=f"{card.major}.{card.minor}",
            )
            for card in cards
        ],
    )


def product_speeds(device: torch.device) -> Iterator[ProductSpeed]:
    """The speed of matrix products in each dtype."""
    use = CoreUse()
    for dtype in DTYPES:
        speed = others = fault = None
        try:
            use.restart()
            speed = product_rate(*matrix_for(device), choose_precision(device, dtype))
            others = use.read().others
        except (UserError, RuntimeError) as error:
            fault = str(error)
        yield ProductSpeed(dtype=dtype, flops_per_second=speed, other_cores=others, fault=fault)


def matrix_for(device: torch.device) -> tuple[int, int, int]:
    """Shape of the product that is timed: rows, inner size, columns."""
    return CUDA_MATRIX if device.type == "cuda" else MATRIX


def fastest(products: Sequence[ProductSpeed], device: torch.device) -> Dtype:
    """The dtype with the fastest matrix products; on a GPU bfloat16 unless another is clearly faster."""
    speeds = {product.dtype: product.flops_per_second or 0.0 for product in products}
    if device.type == "cuda":
        speeds["bfloat16"] *= PREFERENCE_ON_CUDA
    return max(DTYPES, key=lambda dtype: speeds[dtype])


def training_speeds(
    device: torch.device, dtype: Dtype, presets: Sequence[PresetName]
) -> Iterator[TrainingSpeed]:
    """The speed of whole training steps of each preset, optimizer included."""
    use = CoreUse()
    for name in presets:
        speed = others = fault = None
        use.restart()
        try:
            speed = _training_speed(name, device, dtype)
            others = use.read().others
        except (torch.OutOfMemoryError, RuntimeError) as error:
            fault = str(error).splitlines()[0]
        yield TrainingSpeed(
            preset=name, dtype=dtype, tokens_per_second=speed, other_cores=others, fault=fault
        )


def recipe_checks(device: torch.device) -> Iterator[RecipeCheck]:
    """The self-test of each recipe with each backend that the device could have."""
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(TEST_LAYER, generator=draws).mul(0.02).to(device)
    backends: tuple[Backend, ...] = ("emulated", "te", "torchao", "native")
    for name, recipe in RECIPES.items():
        for backend in backends if device.type == "cuda" else backends[:1]:
            products, fault = [], None
            try:
                hardware = resolve_backend(device, recipe, backend)
                products = [
                    ProductError(
                        product=check.product,
                        relative_error=_finite(check.error),
                        fault=check.failure,
                    )
                    for check in check_layer(name, weight, recipe, hardware)
                ]
            except UserError as error:
                fault = str(error)
            yield RecipeCheck(dtype=name, backend=backend, products=products, fault=fault)


def _machine_lines(machine: Machine, device: torch.device) -> Iterator[str]:
    yield f"torch {machine.torch}, {machine.threads} threads on {machine.cores} cores"
    units = machine.bfloat16_units
    remark = "" if units is None else " (no bfloat16 units: float32 may be faster)"
    remark = f" with {', '.join(units)}" if units else remark
    yield f"CPU instructions: {machine.cpu_instructions}{remark}"
    yield f"memory: {machine.memory_bytes / 1e9:.1f} GB, {machine.free_memory_bytes / 1e9:.1f} GB free"
    yield f"disk here: {machine.free_disk_bytes / 1e9:.1f} GB free"
    missing = machine.missing_for_compiling
    yield f"--compile on {device}: {f'lacks {missing}' if missing else 'has what it needs'}"
    if not machine.cuda:
        yield "CUDA: no device, or a CPU build of torch"
    for i, card in enumerate(machine.cuda):
        yield (
            f"cuda:{i}: {card.name}, {card.memory_bytes / 1e9:.1f} GB, "
            f"compute capability {card.compute_capability}"
        )


def _product_line(product: ProductSpeed) -> str:
    if product.flops_per_second is None:
        return f"  {product.dtype:<9} cannot run: {product.fault}"
    speed = product.flops_per_second / 1e9
    return f"  {product.dtype:<9} {speed:>9,.0f} GFLOP/s{_other_programs(product.other_cores)}"


def _training_line(training: TrainingSpeed) -> str:
    speed = training.tokens_per_second
    if speed is None:
        return f"  {training.preset:<5} cannot run: {training.fault}"
    return (
        f"  {training.preset:<5} {speed:>9,.0f} tok/s; the original log's 131M tokens would take "
        f"{format_duration(RECORD_TOKENS / speed)}{_other_programs(training.other_cores)}"
    )


def _recipe_line(check: RecipeCheck) -> str:
    if check.fault is not None:
        return f"{check.dtype:<12} {check.backend:<9} {check.fault}"
    faults = [f"{each.product} {each.fault}" for each in check.products if each.fault]
    errors = " ".join(
        f"{math.nan if each.relative_error is None else each.relative_error:>8.4f}"
        for each in check.products
    )
    return f"{check.dtype:<12} {check.backend:<9} {errors}   {'; '.join(faults) or 'ok'}"


def _other_programs(cores: float | None) -> str:
    """A remark on a speed that was measured while other programs ran; empty if none did."""
    if cores is None or cores < SOME_CORES:
        return ""
    return f"  (other programs used {cores:.1f} of {os.cpu_count()} cores: faster without them)"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _matrix_units() -> list[str] | None:
    """The bfloat16 units of an x86 CPU; None where the kernel does not list them."""
    flags = processor_flags()
    if not flags:
        return None
    return [name for name in ("amx_bf16", "avx512_bf16", "avx_ne_convert") if name in flags]


def _training_speed(name: PresetName, device: torch.device, dtype: Dtype) -> float:
    """Tokens per second of whole training steps of a preset, optimizer included."""
    config = preset_config(name)
    sequences = 16 if device.type == "cpu" else config.batch_size
    config = dataclasses.replace(
        config, batch_size=sequences, dtype=dtype, device=str(device), compile=False
    )
    timer = StepTimer(config, PRESETS[name].vocab_size)
    seconds = CUDA_SECONDS if device.type == "cuda" else 0.0
    return sequences * config.block_size / timer.median(sequences, seconds)
