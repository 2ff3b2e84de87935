"""An imported model as its source computes it; it is not trained here.

The Llama family as `transformers` has it. Our own :class:`~storylab.model.transformer.Transformer` is
narrower (one epsilon, a tied head, no gains for queries and keys) and made for training; attention, rotary
positions, caches and losses are the same code. Shapes are named as there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storylab.imported.shape import HEAD, ImportedShape
from storylab.model.attention import causal_attention
from storylab.model.cache import AnyKVCache, AnyLayerCache, positions_of
from storylab.model.language_model import LanguageModel
from storylab.model.layers import apply_rotary_emb, rope_cos_sin


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions; Qwen3's queries and keys have a norm."""

    def __init__(self, shape: ImportedShape, layer: int) -> None:
        super().__init__()
        self.pattern, self.head_size = shape.layer_patterns[layer], shape.head_size
        queries, keys = shape.n_head * shape.head_size, shape.n_kv_head * shape.head_size
        self.q_proj = nn.Linear(shape.n_embd, queries, bias=False)
        self.k_proj = nn.Linear(shape.n_embd, keys, bias=False)
        self.v_proj = nn.Linear(shape.n_embd, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.n_embd, bias=False)
        if shape.qk_norm:
            self.q_norm: nn.Module = nn.RMSNorm(shape.head_size, shape.norm_epsilon)
            self.k_norm: nn.Module = nn.RMSNorm(shape.head_size, shape.norm_epsilon)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: AnyLayerCache | None
    ) -> Tensor:
        """Mix ``x [B, T, C]`` over time; ``rotary`` is cosine and sine, each ``[T, D]``."""
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = apply_rotary_emb(self.q_norm(query), *rotary)
        key = apply_rotary_emb(self.k_norm(key), *rotary)
        attend = causal_attention if cache is None else cache.attend
        mixed = attend(query, key, value, self.pattern)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: ImportedShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.n_embd, shape.n_hidden, bias=False)
        self.up_proj = nn.Linear(shape.n_embd, shape.n_hidden, bias=False)
        self.down_proj = nn.Linear(shape.n_hidden, shape.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm block: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, shape: ImportedShape, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.n_embd, shape.norm_epsilon)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = nn.RMSNorm(shape.n_embd, shape.norm_epsilon)
        self.mlp = FeedForward(shape)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: AnyLayerCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class ImportedModel(LanguageModel):
    """A model of the Llama family with the weights of its source.

    Args:
        shape: sizes and options.
        weights: tensors of :meth:`ImportedShape.tensors`, any floating dtype; computed in float32.
    """

    config: ImportedShape

    def __init__(self, shape: ImportedShape, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = shape
        with torch.device("meta"):  # the weights take the place of these
            self.embedding = nn.Embedding(shape.vocab_size, shape.n_embd)
            self.layers = nn.ModuleList(Block(shape, layer) for layer in range(shape.n_layer))
            self.norm = nn.RMSNorm(shape.n_embd, shape.norm_epsilon)
            if not shape.tied_head:
                self.head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)
        state = {_own_name(name): value.float() for name, value in weights.items()}
        self.load_state_dict(state, assign=True)
        self.requires_grad_(False).eval()

    @property
    def head_weight(self) -> Tensor:
        """The head may be tied to the embedding."""
        return self.embedding.weight if self.config.tied_head else self.head.weight

    def hidden_states(self, tokens: Tensor, cache: AnyKVCache | None = None) -> Tensor:
        rotary = rope_cos_sin(self.config, positions_of(tokens, cache))
        x = self.embedding(tokens)
        for number, layer in enumerate(self.layers):
            x = layer(x, rotary, cache.layers[number] if cache is not None else None)
        if cache is not None:
            cache.length += tokens.shape[1]  # in place, where it is a tensor
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of ``tokens [B, T]`` (int64)."""
        return self.logits(self.hidden_states(tokens))


def _own_name(name: str) -> str:
    """The name of a weight in the module tree, from its name in `transformers`."""
    if name == HEAD:
        return "head.weight"
    return name.removeprefix("model.").replace("embed_tokens", "embedding")
