"""Reading a history token by token for the logits of the next one.

A token needs every weight, but hardly any arithmetic, so the weights are cast once and not for each token.
On CUDA a step of one token is recorded as a CUDA graph and replayed. Otherwise the host would start some
450 kernels for each token, which takes several times as long as computing them.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storylab.model.autocast import compute_dtype
from storylab.model.cache import AnyKVCache, KVCache, StaticKVCache
from storylab.model.language_model import LanguageModel

# Steps that are computed before one is recorded.
STEPS_BEFORE = 8
Module = TypeVar("Module", bound=nn.Module)
logger = logging.getLogger(__name__)


class Reader(ABC):
    """A model that reads tokens one after another. Made and called without gradient and under one
    autocast; the weights are those of the time when it was made."""

    def __init__(self, model: LanguageModel) -> None:
        dtype = compute_dtype(model.head_weight)
        self.model = model if _has_hooks(model) else _with_cast_weights(model, dtype)
        self.head = model.head_weight.detach().to(dtype)

    @abstractmethod
    def read(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, V]`` of the token after the next ``tokens [B, T]`` (int64).

        The next call may overwrite them.
        """

    @abstractmethod
    def restart(self) -> None:
        """Forget all tokens."""

    def _logits(self, tokens: Tensor, cache: AnyKVCache | None) -> Tensor:
        return F.linear(self.model.hidden_states(tokens, cache).select(1, -1), self.head)


def _has_hooks(model: nn.Module) -> bool:
    """Whether a module calls something before its forward pass, as those do whose weights are shared among
    processes. A copy would call it for the original, and a recorded step would not call it at all."""
    return any(module._forward_pre_hooks for module in model.modules())


def _with_cast_weights(module: Module, dtype: torch.dtype) -> Module:
    """A module that shares everything with ``module`` but the weights of its linear layers, which are in
    ``dtype``. Others may use ``module`` meanwhile."""
    other = copy.copy(module)
    other.__dict__["_modules"] = {
        name: child and _with_cast_weights(child, dtype) for name, child in module._modules.items()
    }
    if type(module) is nn.Linear:
        other.__dict__["_parameters"] = {
            name: nn.Parameter(p.to(dtype), requires_grad=False) if p is not None else None
            for name, p in module._parameters.items()
        }
    return other


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
    """A step of one token is recorded after :data:`STEPS_BEFORE` of them, and then replayed.

    Libraries set themselves up in the first steps, and a short text is not worth a recording. If a step
    cannot be recorded, all are computed as usual.
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
        if self.steps == STEPS_BEFORE + 1:
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
            self.recorded = record(lambda: self._logits(self.token, self.cache), self.token.device)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            logger.warning("sampling without a CUDA graph, which is slower: %s", reason)


def record(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Record the kernels of ``step`` on a CUDA device without running them.

    Returns:
        A function that runs them, and the result of ``step``, which each run overwrites.
    """
    with torch.cuda.device(device):
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # torch's own choice is a stream of the first device. Other threads may allocate meanwhile, as
            # that which saves a checkpoint does.
            with torch.cuda.graph(
                graph, stream=_stream(before.device), capture_error_mode="thread_local"
            ):
                result = step()
        finally:
            # torch would leave a recording that failed on its own stream.
            torch.cuda.set_stream(before)
    return graph.replay, result


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for recording on a device: one for all, as each has memory of its own for products."""
    return torch.cuda.Stream(device)


def reader_of(model: LanguageModel, batch: int, context: int) -> Reader:
    """The fast reader of at most ``context`` tokens for each of ``batch`` rows."""
    recorded = model.embedding.weight.device.type == "cuda" and not _has_hooks(model)
    return (GraphReader if recorded else GrowingReader)(model, batch, context)
