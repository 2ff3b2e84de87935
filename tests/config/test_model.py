"""The config of a model: its parameters and matrices are those of the module."""

from __future__ import annotations

import pytest

from storylab.config import (
    PRESETS,
    ModelConfig,
)
from storylab.errors import UserError
from storylab.model.transformer import Transformer


def test_the_model_of_the_original_log_has_its_parameters() -> None:
    assert ModelConfig().parameter_count(50257) == 112_934_400


@pytest.mark.parametrize("name", ["nano", "3m", "10m"])
def test_the_counted_parameters_are_those_of_the_module(name: str) -> None:
    preset = PRESETS[name]  # type: ignore[index]
    model = Transformer(preset.model, preset.vocab_size)
    count = sum(p.numel() for p in model.parameters())
    assert count == preset.model.parameter_count(preset.vocab_size)


def test_the_matrices_are_those_of_the_module() -> None:
    config = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=40)
    model = Transformer(config, 50)
    found = {name: p for name, p in model.blocks[1].named_parameters() if p.dim() == 2}
    stated = {f"{m.name}.weight": (m.n_out, m.n_in) for m in config.matrices()}
    assert {name: tuple(p.shape) for name, p in found.items()} == stated
    assert list(found) == list(stated)
    parts = [m.parts for m in config.matrices()]
    assert [rows for _, rows in model.block_matrices()] == parts * 2
    assert all(sum(m.parts) == m.n_out for m in config.matrices())


@pytest.mark.parametrize(
    "shape",
    [
        *({"n_embd": 100}, {"n_kv_head": 5}, {"n_layer": 0}, {"n_embd": 12}),
        *({"n_layer": 10**8}, {"n_hidden": 10**16}),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape: dict[str, int]) -> None:
    with pytest.raises(UserError):
        ModelConfig(**shape)  # type: ignore[arg-type]
