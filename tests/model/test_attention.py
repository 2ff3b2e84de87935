"""Attention patterns against a mask written out position by position, and by what
influences what.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_reference import brute_force, draw
from example_patterns import EXAMPLES, pattern_of
from samples import TINY
from storylab.config import FULL, Window, parse_attention
from storylab.model import attention
from storylab.model.attention import causal_attention
from storylab.model.transformer import Transformer


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    time=st.integers(1, 90),
    before=st.sampled_from([0, 0, 0, 1, 7, 40]),
    window=st.one_of(st.none(), st.integers(1, 100)),
    heads=st.sampled_from([(2, 1), (4, 2), (3, 3)]),
)
def test_every_window_is_that_of_the_brute_force(
    time: int, before: int, window: int | None, heads: tuple[int, int]
) -> None:
    query, key, value = draw(time, time + before, *heads)
    ours = causal_attention(query, key, value, pattern_of(window))
    reference = brute_force(query, key, value, window)
    torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-5)
    direction = torch.randn(ours.shape, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((ours * direction).sum(), (query, key, value)),
        torch.autograd.grad((reference * direction).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", EXAMPLES)
@pytest.mark.parametrize("limit", [0, 512], ids=["flash", "products"])
@pytest.mark.parametrize(("time", "before"), [(50, 0), (150, 0), (50, 7), (1, 30)])
def test_every_pattern_is_attention_under_its_mask(
    text: str, limit: int, time: int, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every path of the CPU, in float64 from the mask's own words."""
    # The limit chooses the path; short sequences would all take one.
    monkeypatch.setattr(attention, "MAX_MATMUL_ATTENTION_LENGTH", limit)
    (pattern,) = parse_attention(text)
    source = time + before
    query, key, value = (x.detach() for x in draw(time, source))
    rows, columns = range(before, source), range(source)
    mask = torch.tensor([[bool(pattern.allows(i, j)) for j in columns] for i in rows])
    keys, values = (x.double().repeat_interleave(2, dim=1) for x in (key, value))
    scores = query.double() @ keys.mT / query.shape[-1] ** 0.5
    expected = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ values
    ours = causal_attention(query, key, value, pattern)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_long_window_takes_the_path_of_the_flash_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    # Short sequences would take the path of matrix products.
    monkeypatch.setattr(attention, "MAX_MATMUL_ATTENTION_LENGTH", 0)
    for window in (None, 20, 40):
        query, key, value = draw(48, 48)
        ours = causal_attention(query, key, value, pattern_of(window))
        reference = brute_force(query, key, value, window)
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "reach"), [("window:3", 5), ("window:3,window:2", 4), ("window:1", 1)]
)
def test_nothing_beyond_the_receptive_field_influences_an_output(pattern: str, reach: int) -> None:
    config = dataclasses.replace(TINY, attention=pattern)
    assert config.receptive_field == reach
    model = Transformer(config, 50, seed=1)
    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    model.embedding.register_forward_hook(keep)
    hidden = model.hidden_states(torch.arange(80)[None] % 50)
    for position in (79, 64, 33, 7):
        (gradient,) = torch.autograd.grad(hidden[0, position].sum(), embedded[0], retain_graph=True)
        touched = gradient[0].abs().sum(dim=-1).nonzero().flatten().tolist()
        assert touched == list(range(max(0, position - reach + 1), position + 1))


def test_one_full_layer_reaches_everything() -> None:
    config = dataclasses.replace(TINY, attention="window:2,full")
    assert config.receptive_field is None
    assert config.layer_patterns == (Window(2), FULL)


@pytest.mark.parametrize("pattern", ["window:64", "window:7*3,full"])
def test_initial_weights_do_not_depend_on_the_pattern(pattern: str) -> None:
    plain = Transformer(TINY, 50, seed=3).state_dict()
    windowed = Transformer(dataclasses.replace(TINY, attention=pattern), 50, seed=3).state_dict()
    assert all(torch.equal(plain[name], windowed[name]) for name in plain)
