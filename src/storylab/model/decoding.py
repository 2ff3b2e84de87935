"""Reading a history token by token for the logits of the next one.

A token needs every weight, but hardly any arithmetic, so the weights are cast once and not for each token.
On CUDA a step of one token is recorded as a CUDA graph and replayed. Otherwise the host would start some
450 kernels for each token, which takes several times as long as computing them.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from storylab.model.cache import AnyKVCache, KVCache, StaticKVCache
from storylab.model.language_model import LanguageModel

logger = logging.getLogger(__name__)


class _HiddenStates(nn.Module):
    """A model as a module whose forward pass ends before the head, as ``functional_call`` needs it."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, cache: AnyKVCache | None) -> Tensor:
        return self.model.hidden_states(tokens, cache)


class Reader(ABC):
    """A model that reads tokens one after another. Made and called without gradient and under one
    autocast; the weights are those of the time when it was made."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.states = model, _HiddenStates(model)
        kind = model.embedding.weight.device.type
        enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if enabled else model.head_weight.dtype
        self.head = model.head_weight.detach().to(dtype)
        self.weights = {
            f"{name}.weight": module.weight.detach().to(dtype)
            for name, module in self.states.named_modules()
            if type(module) is nn.Linear
        }

    @abstractmethod
    def read(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, V]`` of the token after the next ``tokens [B, T]`` (int64).

        The next call may overwrite them.
        """

    @abstractmethod
    def restart(self) -> None:
        """Forget all tokens."""

    def _logits(self, tokens: Tensor, cache: AnyKVCache | None) -> Tensor:
        hidden = functional_call(self.states, self.weights, (tokens, cache))
        return F.linear(hidden.select(1, -1), self.head)


class GrowingReader(Reader):
    """Attention over as many positions as have been read."""

    def __init__(self, model: LanguageModel, batch: int, context: int) -> None:
        super().__init__(model)
        self.batch, self.context = batch, context
        self.restart()

    def read(self, tokens: Tensor) -> Tensor:
        return self._logits(tokens, self.cache)

    def restart(self) -> None:
        device = self.model.embedding.weight.device
        self.cache = KVCache(self.model.config, self.batch, self.context, device)


class RereadingReader(Reader):
    """Every position is computed again for each token: slow, for reference."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model)
        self.seen: list[Tensor] = []

    def read(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens)
        return self._logits(torch.cat(self.seen, dim=1), None)

    def restart(self) -> None:
        self.seen.clear()


class GraphReader(Reader):
    """A step of one token is recorded when it comes for the second time, and then replayed.

    The first one is computed as usual, since libraries set themselves up in it. If a step cannot be
    recorded, all are computed as usual.
    """

    def __init__(self, model: LanguageModel, batch: int, context: int) -> None:
        super().__init__(model)
        device = model.embedding.weight.device
        self.cache = StaticKVCache(model.config, context, device)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.steps = 0
        self.recorded: tuple[Callable[[], None], Tensor] | None = None

    def read(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > 1:
            return self._logits(tokens, self.cache)
        self.token.copy_(tokens)
        self.steps += 1
        if self.steps == 2:
            self._record()
        if self.recorded is None:
            return self._logits(self.token, self.cache)
        replay, logits = self.recorded
        replay()
        return logits

    def restart(self) -> None:
        self.cache.restart()

    def _record(self) -> None:
        try:
            self.recorded = record(lambda: self._logits(self.token, self.cache))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            logger.warning("sampling without a CUDA graph, which is slower: %s", reason)


def record(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record the kernels of ``step`` without running them.

    Returns:
        A function that runs them, and the result of ``step``, which each run overwrites.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may allocate meanwhile, as that which saves a checkpoint does.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step()
    return graph.replay, result


def reader_of(model: LanguageModel, batch: int, context: int) -> Reader:
    """The fast reader of at most ``context`` tokens for each of ``batch`` rows."""
    on_cuda = model.embedding.weight.device.type == "cuda"
    return (GraphReader if on_cuda else GrowingReader)(model, batch, context)
