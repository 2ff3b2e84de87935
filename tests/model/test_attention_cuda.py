"""The kernels of CUDA against attention position by position, with what a card computes replaced."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attention_reference import brute_force, draw
from samples import TINY
from storylab.config import FULL, Window
from storylab.model import attention_cuda
from storylab.model.attention import causal_attention
from storylab.model.attention_cuda import FlashWindow, cuda_masks
from storylab.model.layers import rope_cos_sin
from storylab.model.transformer import Block

varlen: Any = pytest.importorskip("torch.nn.attention.varlen")
WINDOWS = (FULL, Window(64), Window(200))


class Sequence:
    """A sequence of the many that flash attention reads, laid end to end in ``[N, heads, D]``, in float64.

    As the documentation has it: query i reads keys i - left to i + right, and a group of heads shares keys.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, part: slice, window: list[int]
    ) -> None:
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        self.query, self.key, self.value = (
            x[part].transpose(0, 1).double() for x in (query, key, value)
        )
        self.scale = query.shape[-1] ** -0.5
        positions = torch.arange(length(part))
        apart = positions[:, None] - positions[None, :]
        unread = (apart > window[0]) | (apart < -window[1])
        scores = self.query @ self.key.mT * self.scale
        self.weights = scores.masked_fill(unread, float("-inf")).softmax(-1)

    def forward(self) -> Tensor:
        return (self.weights @ self.value).transpose(0, 1)

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, and of key and value for every query head, ``[T, H, D]``."""
        grad = grad.transpose(0, 1).double()
        of_weights = grad @ self.value.mT
        inner = (of_weights * self.weights).sum(-1, keepdim=True)
        of_scores = self.weights * (of_weights - inner) * self.scale
        grads = of_scores @ self.key, of_scores.mT @ self.query, self.weights.mT @ grad
        of_query, of_key, of_value = (x.transpose(0, 1) for x in grads)
        return of_query, of_key, of_value


def parts_of(starts: Tensor) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(starts.tolist())]


@pytest.fixture(scope="module")
def flash_kernels() -> None:
    """A CPU has no flash attention with windows, so torch's operators get one."""

    @varlen._varlen_attn.register_kernel("cpu")
    def forward(
        query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *others: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        window = others[5]
        assert others[1:3] == (max(map(length, parts_of(starts))),) * 2
        found = [Sequence(query, key, value, part, window) for part in parts_of(starts)]
        out = torch.cat([part.forward() for part in found]).to(query.dtype)
        lse = torch.zeros(query.shape[1], query.shape[0])
        return out, lse, torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any
    ) -> tuple[Tensor, ...]:
        starts, window = others[2], others[-1]
        parts = parts_of(starts)
        found = [Sequence(query, key, value, part, window).backward(grad[part]) for part in parts]
        whole = [torch.cat(grads) for grads in zip(*found, strict=True)]
        shared = [x.unflatten(1, (key.shape[1], -1)).sum(2) for x in whole[1:]]
        return tuple(x.to(query.dtype) for x in (whole[0], *shared))


def length(part: slice) -> int:
    return int(part.stop - part.start)


def starts_of(batch: int, time: int) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32) * time


@pytest.mark.usefixtures("flash_kernels")
@pytest.mark.parametrize(("time", "size"), [(1, 1), (30, 1), (30, 7), (64, 63)])
def test_flash_attention_reads_the_window(time: int, size: int) -> None:
    inputs = draw(time, time)
    mask = FlashWindow(starts_of(2, time), time, size)
    ours = causal_attention(*inputs, Window(size), mask)
    expected = brute_force(*inputs, size)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn(ours.shape)
    ours_back, expected_back = (
        torch.autograd.grad(x, inputs, direction.to(x.dtype)) for x in (ours, expected)
    )
    torch.testing.assert_close(ours_back, expected_back, rtol=1e-4, atol=1e-5)


def windowed_block() -> tuple[Block, Tensor, tuple[Tensor, Tensor], Tensor]:
    """A block with a window of 20, its input and rotary angles, and its output by a mask."""
    config = dataclasses.replace(TINY, attention="window:20")
    block, x = Block(config, 0), torch.randn(2, 150, config.n_embd)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    rotary = rope_cos_sin(config, torch.arange(150))
    return block, x, rotary, block(x, rotary)[0]


@pytest.mark.slow
@pytest.mark.usefixtures("flash_kernels")
def test_a_compiled_block_with_flash_attention_is_one_graph() -> None:
    block, x, rotary, expected = windowed_block()
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    mask = FlashWindow(starts_of(2, 150), 150, 20)
    ours, _ = compiled(x, rotary, cuda_mask=mask)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    weights = list(block.parameters())
    ours_back, expected_back = (
        torch.autograd.grad(x.square().sum(), weights) for x in (ours, expected)
    )
    torch.testing.assert_close(ours_back, expected_back, rtol=1e-3, atol=1e-3)
    torch.compiler.reset()


def test_each_window_takes_the_kernel_that_its_card_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and in evaluation."""

    class Positions(Tensor):
        """A tensor that says it is on a card."""

        device = torch.device("cuda")  # type: ignore[assignment]

    x = torch.zeros(2, 128).as_subclass(Positions)
    arange = torch.arange
    # Nothing can be put on a card here; masks are just their arguments.
    monkeypatch.setattr(torch, "arange", lambda *args, device, **how: arange(*args, **how))
    monkeypatch.setattr(attention_cuda, "_block_mask", lambda *args: args)
    monkeypatch.setattr(attention_cuda, "missing_for_compiling", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    def masks(dtype: torch.dtype, head_size: int = 64) -> list[str]:
        on = dtype != torch.float32
        with (
            patch.object(torch, "is_autocast_enabled", lambda kind: on),
            patch.object(torch, "get_autocast_dtype", lambda kind: dtype),
        ):
            return [type(mask).__name__ for mask in cuda_masks(WINDOWS, x, head_size)]

    none, flash, blocks = "NoneType", "FlashWindow", "tuple"
    assert masks(torch.bfloat16) == masks(torch.float16) == [none, flash, none]
    assert masks(torch.float32) == [none, blocks, none]
    assert masks(torch.bfloat16, 20) == masks(torch.bfloat16, 200) == [none, blocks, none]
    assert masks(torch.bfloat16, 8) == [none, flash, none]
    assert masks(torch.float32, 8) == [none] * 3
    with patch.object(attention_cuda, "VARLEN_ATTENTION", None):  # an older torch
        assert masks(torch.bfloat16) == [none, blocks, none]
    with patch.object(torch.backends.cuda, "is_flash_attention_available", lambda: False):
        assert masks(torch.bfloat16) == [none, blocks, none]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert masks(torch.bfloat16) == [none, blocks, none]
    monkeypatch.setattr(attention_cuda, "missing_for_compiling", lambda device: "a C compiler")
    assert masks(torch.bfloat16) == [none] * 3
    assert cuda_masks(WINDOWS, torch.zeros(2, 128), 64) == [None] * 3


def flex_mask(time: int, window: int) -> BlockMask:
    # The public function makes a mask on GPUs only; the mask itself can be read on a CPU.
    return attention_cuda._block_mask(time, Window(window), torch.device("cpu"))


@pytest.mark.slow
def test_a_compiled_block_takes_the_mask_as_it_is() -> None:
    """One graph with FlexAttention in it, no warning, and no mask made inside."""
    block, x, rotary, expected = windowed_block()
    mask, graphs = flex_mask(150, 20), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        ours, _ = torch.compile(block, backend=backend, fullgraph=True)(x, rotary, cuda_mask=mask)
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
