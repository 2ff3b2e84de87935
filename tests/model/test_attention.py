"""Attention patterns against a mask written out position by position, and by what
influences what.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask

from example_patterns import EXAMPLES, pattern_of
from samples import TINY
from storylab.config import FULL, Window, parse_attention
from storylab.model import attention
from storylab.model.attention import causal_attention
from storylab.model.layers import rope_cos_sin
from storylab.model.transformer import Block, Transformer


def brute_force(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Position by position in float64, with no mask at all."""
    batch, heads, time, size = query.shape
    kv_heads, source = key.shape[1], key.shape[2]
    query, key, value = query.double(), key.double(), value.double()
    result = torch.empty(batch, heads, time, size, dtype=torch.float64)
    for head in range(heads):
        k, v = (x[:, head * kv_heads // heads] for x in (key, value))
        for row in range(time):
            position = source - time + row
            first = 0 if window is None else max(0, position - window + 1)
            scores = torch.einsum("bd,bsd->bs", query[:, head, row], k[:, first : position + 1])
            weights = (scores / size**0.5).softmax(dim=-1)
            result[:, head, row] = torch.einsum("bs,bsd->bd", weights, v[:, first : position + 1])
    return result


def draw(time: int, source: int, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(time * 1000 + source)
    shapes = [(2, heads, time, 8), (2, kv_heads, source, 8), (2, kv_heads, source, 8)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


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


def flex_mask(time: int, window: int) -> BlockMask:
    # The public function makes a mask on GPUs only; the mask itself can be read on a CPU.
    return attention._block_mask(time, Window(window), torch.device("cpu"))


def test_windows_on_a_card_are_read_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and in evaluation, where FlexAttention can be compiled and takes the heads."""
    cpu, cuda, windows = torch.device("cpu"), torch.device("cuda"), (FULL, Window(64), Window(200))
    # Its kernel needs a GPU; here the mask is just its arguments.
    monkeypatch.setattr(attention, "_block_mask", lambda time, pattern, device: (time, pattern))
    monkeypatch.setattr(attention, "missing_for_compiling", lambda device: None)
    assert attention.block_masks(windows, 128, cpu, 64) == [None] * 3
    assert attention.block_masks(windows, 128, cuda, 64) == [None, (128, Window(64)), None]
    with torch.no_grad():
        assert attention.block_masks(windows, 128, cuda, 64) == [None, (128, Window(64)), None]
    assert attention.block_masks(windows, 128, cuda, 8) == [None] * 3
    monkeypatch.setattr(attention, "missing_for_compiling", lambda device: "a C compiler")
    assert attention.block_masks(windows, 128, cuda, 64) == [None] * 3


@pytest.mark.slow
def test_a_compiled_block_takes_the_mask_as_it_is() -> None:
    """One graph with FlexAttention in it, no warning, and no mask made inside."""
    config = dataclasses.replace(TINY, attention="window:20")
    block, x = Block(config, 0), torch.randn(2, 150, config.n_embd)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    rotary = rope_cos_sin(config, torch.arange(150))
    expected, _ = block(x, rotary)
    mask, graphs = flex_mask(150, 20), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        ours, _ = torch.compile(block, backend=backend, fullgraph=True)(x, rotary, block_mask=mask)
    torch.compiler.reset()
    (graph,) = graphs
    names = " ".join(str(node.target) for node in graph.graph.nodes)
    assert "flex_attention" in names and "vmap" not in names
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_graphics_card_path_computes_the_same_window() -> None:
    """FlexAttention runs uncompiled on the CPU; the compiled kernel needs a card."""
    query, key, value = (x.detach() for x in draw(150, 150))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that uncompiled is slow
        ours = causal_attention(query, key, value, Window(20), flex_mask(150, 20))
    reference = brute_force(query, key, value, 20)
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
