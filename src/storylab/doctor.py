"""Examines this machine: devices, precisions, and speeds measured on real training steps."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Generator, Iterator, Sequence

import psutil
import torch

from storylab.compiler import missing_for_compiling, processor_flags
from storylab.config import PRESETS, Backend, Dtype, PresetName, TrainConfig, preset_config
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
TEST_LAYER = (2048, 768)


def examine(device_name: str, presets: Sequence[PresetName]) -> Iterator[str]:
    """Lines that describe the machine, then measured speeds, as they become known.

    Args:
        device_name: auto, cpu, cuda or mps.
        presets: models to time a few micro-batches of.

    Raises:
        UserError: there is no such device.
    """
    device = choose_device(device_name)
    yield from _machine_lines(device)
    yield ""
    yield f"matrix products on {device} (rows {MATRIX[0]}, {MATRIX[1]} to {MATRIX[2]} columns):"
    best = yield from _product_lines(device)
    yield f"fastest: --dtype {best}"
    yield ""
    yield f"training steps in {best}, uncompiled (a few micro-batches each, so expect 20 % either way):"
    use = CoreUse()
    for name in presets:
        use.restart()
        try:
            speed = _training_speed(name, device, best)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            yield f"  {name:<5} cannot run: {str(error).splitlines()[0]}"
            continue
        whole = format_duration(RECORD_TOKENS / speed)
        yield (
            f"  {name:<5} {speed:>9,.0f} tok/s; the original log's 131M tokens would take {whole}"
            f"{other_programs(use)}"
        )


def _machine_lines(device: torch.device) -> Iterator[str]:
    """Versions, CPU, memory, disk, compiler and CUDA devices."""
    yield f"torch {torch.__version__}, {torch.get_num_threads()} threads on {os.cpu_count()} cores"
    yield f"CPU instructions: {torch.backends.cpu.get_cpu_capability()}{_matrix_units()}"
    memory = psutil.virtual_memory()
    yield f"memory: {memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free"
    yield f"disk here: {shutil.disk_usage('.').free / 1e9:.1f} GB free"
    missing = missing_for_compiling(device.type)
    yield f"--compile on {device}: {f'lacks {missing}' if missing else 'has what it needs'}"
    if not torch.cuda.is_available():
        yield "CUDA: no device, or a CPU build of torch"
        return
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        yield (
            f"cuda:{i}: {card.name}, {card.total_memory / 1e9:.1f} GB, "
            f"compute capability {card.major}.{card.minor}"
        )


def _product_lines(device: torch.device) -> Generator[str, None, Dtype]:
    """The speed of matrix products in each dtype; returns the fastest."""
    use = CoreUse()
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
    rates: dict[Dtype, float] = {}
    for dtype in dtypes:
        try:
            use.restart()
            rates[dtype] = product_rate(*MATRIX, choose_precision(device, dtype))
            yield f"  {dtype:<9} {rates[dtype] / 1e9:>9,.0f} GFLOP/s{other_programs(use)}"
        except (UserError, RuntimeError) as error:
            yield f"  {dtype:<9} cannot run: {error}"
    return max(rates, key=lambda dtype: rates[dtype])


def other_programs(use: CoreUse) -> str:
    """A remark on a speed that was measured while other programs ran; empty if none did."""
    others = use.read().others
    if others < SOME_CORES:
        return ""
    return f"  (other programs used {others:.1f} of {os.cpu_count()} cores: faster without them)"


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
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(TEST_LAYER, generator=draws).mul(0.02).to(device)
    backends: tuple[Backend, ...] = ("emulated", "te", "torchao")
    for name, recipe in RECIPES.items():
        for backend in backends if device.type == "cuda" else backends[:1]:
            try:
                hardware = resolve_backend(device, recipe, backend)
                checks = list(check_layer(name, weight, recipe, hardware))
            except UserError as error:
                yield f"{name:<12} {backend:<9} {error}"
                continue
            faults = [f"{check.product} {check.failure}" for check in checks if check.failure]
            errors = " ".join(f"{check.error:>8.4f}" for check in checks)
            yield f"{name:<12} {backend:<9} {errors}   {'; '.join(faults) or 'ok'}"


def _matrix_units() -> str:
    """The bfloat16 units of an x86 CPU; empty where the kernel does not list them."""
    flags = processor_flags()
    if not flags:
        return ""
    units = [name for name in ("amx_bf16", "avx512_bf16", "avx_ne_convert") if name in flags]
    return f" with {', '.join(units)}" if units else " (no bfloat16 units: float32 may be faster)"


def _training_speed(name: PresetName, device: torch.device, dtype: Dtype) -> float:
    """Tokens per second of whole training steps of a preset, optimizer included."""
    config = preset_config(name)
    sequences = 16 if device.type == "cpu" else config.batch_size
    config = dataclasses.replace(
        config, batch_size=sequences, dtype=dtype, device=str(device), compile=False
    )
    timer = StepTimer(config, PRESETS[name].vocab_size)
    return sequences * config.block_size / timer.median(sequences, 0.0)
