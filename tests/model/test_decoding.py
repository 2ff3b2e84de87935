"""A recorded step against steps that are computed one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from example_patterns import EXAMPLES
from samples import TINY
from small_models import tokens
from storylab.model import decoding
from storylab.model.cache import KVCache, StaticKVCache
from storylab.model.decoding import GraphReader, GrowingReader
from storylab.model.generate import Sampling, generate
from storylab.model.transformer import Transformer


class Recorder:
    """In place of a CUDA graph: operations on tensors are recorded, whatever the host knows becomes a
    constant, and the length is as it was before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded, self.replayed = 0, 0
        monkeypatch.setattr(decoding, "record", self.record)
        monkeypatch.setattr("storylab.model.generate.reader_of", self.reader)

    def reader(self, *args: Any) -> GraphReader:
        self.last = GraphReader(*args)
        return self.last

    def record(
        self, step: Callable[[], Tensor], device: torch.device
    ) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        before = self.last.cache.length.clone()
        graph = make_fx(step)()
        self.last.cache.length.copy_(before)
        result = torch.zeros(len(self.last.token), len(self.last.head))

        def replay() -> None:
            self.replayed += 1
            result.copy_(graph())

        return replay, result


class Casts(TorchDispatchMode):
    """The shapes of the tensors that are cast to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._to_copy.default:
            self.shapes.add(args[0].shape)
        return function(*args, **(kwargs or {}))


def written(model: Transformer, prompt: Tensor, count: int, context: int) -> Tensor:
    sampling = Sampling(temperature=1.0, seed=7)
    with torch.no_grad():
        return torch.stack(list(generate(model, prompt, count, sampling, context)), dim=1)


@pytest.mark.parametrize("context", [2, 3, 12])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_recorded_steps_write_the_same_story(
    any_model: Transformer, length: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens(4, length)
    expected = written(any_model, prompt, 30, context)  # which fills and is cut several times
    recorder = Recorder(monkeypatch)
    assert torch.equal(written(any_model, prompt, 30, context), expected)
    assert recorder.recorded == 1 and recorder.replayed > 10


@pytest.mark.parametrize("pattern", [*EXAMPLES, "window:1", "window:6,full", "window:40"])
def test_recorded_steps_keep_to_the_pattern(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(dataclasses.replace(TINY, attention=pattern), 50, seed=2)
    prompt = tokens(2, 9) % 50
    expected = written(model, prompt, 60, 48)
    Recorder(monkeypatch)
    assert torch.equal(written(model, prompt, 60, 48), expected)


def test_a_static_cache_gives_the_logits_of_the_whole_sequence(any_model: Transformer) -> None:
    x = tokens(3, 15)
    cache = StaticKVCache(any_model.config, 20, torch.device("cpu"))
    for _ in range(2):  # what an earlier history left behind is not read
        parts = [
            any_model.logits(any_model.hidden_states(x[:, a:b], cache))
            for a, b in ((0, 6), (6, 7), (7, 11), (11, 15))
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), any_model(x), rtol=1e-5, atol=1e-5)
        x = x.flip(1)
        cache.restart()


def test_a_step_that_cannot_be_recorded_is_computed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Transformer(TINY, 50, seed=2)
    expected = written(model, tokens(2, 3) % 50, 20, 12)

    def refuse(step: Callable[[], Tensor], device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    Recorder(monkeypatch)
    monkeypatch.setattr(decoding, "record", refuse)
    assert torch.equal(written(model, tokens(2, 3) % 50, 20, 12), expected)
    (line,) = caplog.messages
    assert line.endswith("operation not permitted when stream is capturing")


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_weights_that_are_cast_once_give_the_same_bits(any_model: Transformer, low: bool) -> None:
    x = tokens(2, 9)
    before = {name: p.clone() for name, p in any_model.named_parameters()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        reader = GrowingReader(any_model, 2, 20)
        cache = KVCache(any_model.config, 2, 20, torch.device("cpu"))
        for part in (x[:, :7], x[:, 7:8], x[:, 8:]):
            expected = any_model.logits(any_model.hidden_states(part, cache)[:, -1])
            with Casts() as casts:
                assert torch.equal(reader.read(part), expected)
            # The embedding is a matrix too, but a row of it is all that is read.
            assert not casts.shapes & {m.shape for m in before.values() if m.dim() > 1}
    for name, p in any_model.named_parameters():
        assert torch.equal(p, before[name])


def test_threads_may_write_with_one_model() -> None:
    model = Transformer(TINY, 50, seed=2)
    before = {name: p.clone() for name, p in model.named_parameters()}

    def story(seed: int) -> list[int]:
        prompt = torch.tensor([[seed]])
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return [int(t) for t in generate(model, prompt, 60, Sampling(seed=seed), 32)]

    expected = list(map(story, range(4)))
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(story, range(4))) == expected
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, before[name])


def test_a_model_with_hooks_is_neither_copied_nor_recorded() -> None:
    """As one whose weights are gathered before each block."""
    model, calls = Transformer(TINY, 50, seed=2), []
    expected = written(model, tokens(1, 3) % 50, 10, 8)
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: calls.append(block))
    assert torch.equal(written(model, tokens(1, 3) % 50, 10, 8), expected)
    assert calls == [model.blocks[0]] * 10
    assert GrowingReader(model, 1, 8).model is model


def test_each_device_has_its_reader() -> None:
    model = Transformer(TINY, 50)
    assert isinstance(decoding.reader_of(model, 1, 8), GrowingReader)
