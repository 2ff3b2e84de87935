"""TransformerEngine as a backend: its arguments against its real source, its calls with a stand-in."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch

from conformance import generator
from engine_stand_in import (
    A100,
    B200,
    RTX_4090,
    RTX_5090,
    arguments_of,
    definition,
    stand_in,
    te_source,
)
from samples import TINY
from storylab.errors import UserError
from storylab.model.transformer import Transformer
from storylab.precision.backends import native, te, torchao
from storylab.precision.backends.te import require_te_version, te_arguments
from storylab.precision.convert import quantize_blocks
from storylab.precision.edit import find_recipe
from storylab.precision.recipes import (
    RECIPES,
)


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
    for backend in (te, torchao, native):
        with pytest.raises(UserError, match=f"{message}.*emulated"):
            backend.load(RECIPES[dtype], "card", capability)


def test_old_versions_that_train_nvfp4_wrongly_on_geforce_are_refused() -> None:
    for version in ("2.13.0", "2.19.1"):
        with pytest.raises(UserError, match=r"2\.20 or later, use --dtype nvfp4-plain"):
            require_te_version(version, RECIPES["nvfp4"], RTX_5090)
        require_te_version(version, RECIPES["nvfp4-plain"], RTX_5090)
        require_te_version(version, RECIPES["nvfp4"], B200)
    require_te_version("2.20.2", RECIPES["nvfp4"], RTX_5090)
