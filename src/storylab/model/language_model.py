"""A causal language model, as sampling and evaluation use it: one of ours, or an imported one.

Shapes: B batch, T time (positions), C width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storylab.config import AttentionPattern
from storylab.model.head import token_losses

if TYPE_CHECKING:
    from storylab.model.cache import AnyKVCache


class Shape(Protocol):
    """The facts about a model that its key/value cache and its rotary positions depend on."""

    @property
    def n_kv_head(self) -> int:
        """Key/value heads of a layer."""
        ...

    @property
    def head_size(self) -> int:
        """Width of a head."""
        ...

    @property
    def rope_base(self) -> float:
        """Base of the rotary position frequencies."""
        ...

    @property
    def layer_patterns(self) -> tuple[AttentionPattern, ...]:
        """The attention pattern of each layer."""
        ...


class LanguageModel(nn.Module, ABC):
    """A causal language model over token ids."""

    config: Shape
    embedding: nn.Embedding

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """The matrix from final states to logits, ``[V, C]``."""

    @abstractmethod
    def hidden_states(self, tokens: Tensor, cache: AnyKVCache | None = None) -> Tensor:
        """Final normed states ``[B, T, C]`` of ``tokens [B, T]`` (int64).

        With a cache the tokens continue the positions already in it, and the cache grows.
        """

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Logits ``[..., V]`` of the token after each of the final states ``[..., C]``."""
        return F.linear(hidden_states, self.head_weight)

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of every position, ``[B, T]`` float32, without gradient."""
        with torch.no_grad():
            hidden = self.hidden_states(tokens).flatten(0, 1)
            losses = token_losses(hidden, self.head_weight, targets.flatten())
        return losses.view(targets.shape)
