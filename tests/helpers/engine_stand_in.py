"""A stand-in for TransformerEngine, which needs a GPU to be imported, and its real source to read."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import conformance
from storylab.precision.linear import QuantizedLinear
from storylab.precision.recipes import (
    Recipe,
)
from storylab.precision.state import QuantizationState


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
    """Stands in for TransformerEngine: multiplies by our emulation and records its arguments."""

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
