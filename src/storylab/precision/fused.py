"""Passes over a tensor, compiled to one kernel where that pays, with the same bits either way."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from storylab.compiler import missing_for_compiling, set_tuning

# From this many elements on a pass over a tensor is worth the compiler.
FUSE_FROM = 2**18
# A kernel for every format, its numbers built in: as variables of one kernel they come out wrong (torch
# 2.13, MXFP8 in E5M2 after E4M3, in one process or through the cache on disk). And as many kernels
# as there are formats and shapes of blocks, not the few after which the compiler gives up.
COMPILING = {"specialize_int": True, "specialize_float": True, "recompile_limit": 64}


class fused:  # noqa: N801 - used as a decorator
    """Decorator: compile a function of a tensor to one kernel for large tensors on a CPU.

    Kernel and function give the same bits, so either may run: the function runs for small tensors and
    where nothing can be compiled (no C++ compiler, or no Python headers). Each kernel is compared with
    the function on the first tensor of its kind, and is not used if a bit differs.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.name = function, function.__name__
        self.proven: dict[object, bool] = {}
        """Whether the kernel for a kind of arguments may be used."""
        self.wrong = False
        """Whether any kernel gave another result than the function."""

    @cached_property
    def kernel(self) -> Callable[..., Tensor] | None:
        """The compiled function, None where nothing can be compiled."""
        if missing_for_compiling("cpu") is not None:
            return None
        set_tuning()
        # On first use, as the compiler takes seconds to import.
        return torch.compile(self.function, dynamic=True, fullgraph=True)

    def __call__(self, values: Tensor, *others: object) -> Tensor:
        large = values.device.type == "cpu" and values.numel() >= FUSE_FROM
        kind = _kind(values, others)
        if not large or not self.proven.get(kind, True) or self.kernel is None:
            return self.function(values, *others)
        try:
            with torch._dynamo.config.patch(COMPILING):
                result = self.kernel(values, *others)
        except Exception:
            self.proven[kind] = False  # any failure is caught, as the function needs no compiler
            return self.function(values, *others)
        if kind in self.proven:
            return result
        right = self.function(values, *others)
        same = (result == right) | (result.isnan() & right.isnan())
        self.proven[kind] = bool(same.all())
        self.wrong |= not self.proven[kind]
        return right


def _kind(values: Tensor, others: tuple[object, ...]) -> object:
    """Key of the arguments that get a separate kernel from the compiler."""
    return tuple(
        (x.dtype, x.dim(), x.is_contiguous()) if isinstance(x, Tensor) else x
        for x in (values, *others)
    )
