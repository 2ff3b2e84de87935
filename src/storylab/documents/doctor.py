"""The document of ``storylab doctor --json``."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from storylab.documents.fields import about


class CudaDevice(Struct, frozen=True, kw_only=True):
    """A CUDA device."""

    name: Annotated[str, about("as the driver calls it")]
    memory_bytes: Annotated[int, about("memory of the device", "bytes")]
    compute_capability: Annotated[str, about("CUDA's compute capability, such as `9.0`")]


class Machine(Struct, frozen=True, kw_only=True):
    """Versions and sizes of a machine."""

    torch: Annotated[str, about("version of torch")]
    threads: Annotated[int, about("threads that torch uses")]
    cores: Annotated[int | None, about("logical cores; null if the system does not say")]
    cpu_instructions: Annotated[str, about("the widest vector instructions that torch uses")]
    bfloat16_units: Annotated[
        list[str] | None,
        about("bfloat16 units of the CPU; null where the system does not list them"),
    ]
    memory_bytes: Annotated[int, about("memory of the machine", "bytes")]
    free_memory_bytes: Annotated[int, about("memory that programs could still take", "bytes")]
    free_disk_bytes: Annotated[int, about("free space in the current folder", "bytes")]
    missing_for_compiling: Annotated[
        str | None, about("the requirement that `--compile` lacks on the device; null: nothing")
    ]
    cuda: Annotated[list[CudaDevice], about("the CUDA devices, in the order of their numbers")]


class ProductSpeed(Struct, frozen=True, kw_only=True):
    """The speed of matrix products in one dtype."""

    dtype: Annotated[str, about("`float32`, `bfloat16` or `float16`")]
    flops_per_second: Annotated[
        float | None, about("the best of several; null if it cannot run", "FLOP per second")
    ]
    other_cores: Annotated[
        float | None,
        about("CPU cores that other programs used meanwhile; null if it cannot run", "cores"),
    ]
    fault: Annotated[str | None, about("why it cannot run; else null")]


class TrainingSpeed(Struct, frozen=True, kw_only=True):
    """The speed of uncompiled training steps of one preset."""

    preset: Annotated[str, about("the named shape of the model")]
    dtype: Annotated[str, about("the fastest of `products`, which the steps run in")]
    tokens_per_second: Annotated[
        float | None, about("null if it cannot run; expect 20 % either way", "tokens per second")
    ]
    other_cores: Annotated[
        float | None,
        about("CPU cores that other programs used meanwhile; null if it cannot run", "cores"),
    ]
    fault: Annotated[str | None, about("why it cannot run; else null")]


class ProductError(Struct, frozen=True, kw_only=True):
    """The error of one product of a layer in low precision."""

    product: Annotated[
        str, about("the field of the recipe: `forward`, `input_gradient` or `weight_gradient`")
    ]
    relative_error: Annotated[
        float | None, about("of the norm of the float32 product; null if it is not finite")
    ]
    fault: Annotated[str | None, about("why the error is wrong for the recipe; null: it is right")]


class RecipeCheck(Struct, frozen=True, kw_only=True):
    """The self-test of one recipe with one backend."""

    dtype: Annotated[str, about("the value of `--dtype` that chooses the recipe")]
    backend: Annotated[str, about("`emulated`, `te`, `torchao` or `native`")]
    products: Annotated[list[ProductError], about("the three products; empty if it cannot run")]
    fault: Annotated[str | None, about("why it cannot run; else null")]


class DoctorDocument(
    Struct, frozen=True, kw_only=True, tag_field="schema", tag="storylab.doctor/1"
):
    """A machine, and speeds or errors that were measured on it."""

    device: Annotated[str, about("the device that was measured, such as `cpu` or `cuda`")]
    machine: Annotated[Machine, about("versions and sizes")]
    products: Annotated[
        list[ProductSpeed] | None, about("matrix products; null with `--precision`")
    ]
    training: Annotated[
        list[TrainingSpeed] | None, about("training steps; null with `--precision`")
    ]
    recipes: Annotated[
        list[RecipeCheck] | None, about("low-precision recipes; null without `--precision`")
    ]
