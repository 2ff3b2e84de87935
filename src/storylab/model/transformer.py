"""The transformer: the Llama architecture at small scale.

Shapes: B batch, T time (positions), C width (n_embd), H query heads, K key/value heads,
D head size, F hidden width of the feed-forward layer, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storylab.compiler import set_tuning
from storylab.config import ModelConfig
from storylab.model.attention import causal_attention
from storylab.model.attention_cuda import CudaMask, cuda_masks
from storylab.model.autocast import compute_dtype
from storylab.model.cache import AnyKVCache, AnyLayerCache, positions_of
from storylab.model.head import linear_cross_entropy
from storylab.model.initialization import initialize_weights
from storylab.model.language_model import LanguageModel
from storylab.model.layers import RMSNorm, apply_rotary_emb, rms_norm, rope_cos_sin
from storylab.model.recompute import recompute, recompute_block


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.n_head, config.n_kv_head
        self.pattern, self.qk_norm = config.layer_patterns[layer], config.qk_norm
        # Query, key and value rows in one matrix: one product instead of three, two of them thin.
        self.qkv = nn.Linear(config.n_embd, config.qkv_size, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if config.has_value_residual(layer):
            self.value_scale = nn.Parameter(torch.empty(()))

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm,
        rotary: tuple[Tensor, Tensor],
        cache: AnyLayerCache | None = None,
        value_residual: Tensor | None = None,
        cuda_mask: CudaMask | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mix ``norm(x)`` over time.

        Args:
            x: the residual stream, ``[B, T, C]``.
            norm: the block's norm, applied here so that the backward pass can recompute it.
            rotary: cosine and sine, each ``[T, D]``.
            cache: earlier positions of this layer; grows.
            value_residual: added to the values by a learned scale, ``[B, T, K * D]``.
            cuda_mask: the layer's, see :mod:`storylab.model.attention_cuda`.

        Returns:
            The output ``[B, T, C]`` and this layer's own values ``[B, T, K * D]``.
        """
        qkv = recompute(lambda x: self.qkv(norm(x)), x)
        mixed = recompute(lambda qkv: self._mix(qkv, rotary, cache, value_residual, cuda_mask), qkv)
        size = self.out.in_features // self.heads
        sizes = ((self.heads + self.kv_heads) * size, self.kv_heads * size)
        return mixed, qkv.split(sizes, dim=-1)[1]

    def _mix(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: AnyLayerCache | None,
        value_residual: Tensor | None,
        cuda_mask: CudaMask | None,
    ) -> Tensor:
        """Output ``[B, T, C]`` of queries, keys and values ``qkv [B, T, (H + 2K) * D]``."""
        batch, time, _ = qkv.shape
        width = self.out.in_features
        heads = qkv.view(batch, time, -1, width // self.heads).transpose(1, 2)
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if value_residual is not None:
            more = (self.value_scale * value_residual).view(batch, time, self.kv_heads, -1)
            value = value + more.transpose(1, 2).to(value.dtype)
        if self.qk_norm:  # rotation keeps the length; autocast on CUDA widens norms to float32
            normed = (rms_norm(x).to(value.dtype) for x in (query, key))
            query, key = normed
        query, key = apply_rotary_emb(query, *rotary), apply_rotary_emb(key, *rotary)
        if cache is not None:
            mixed = cache.attend(query, key, value, self.pattern)
        else:
            mixed = causal_attention(query, key, value, self.pattern, cuda_mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=False)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """``[B, T, C]`` from ``norm(x)`` of ``x [B, T, C]``; the norm is applied here as in attention."""
        gate_up = recompute(lambda x: self.gate_up(norm(x)), x)
        return recompute(self._gated, gate_up)

    def _gated(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.n_embd)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.n_embd)
        self.feed_forward = FeedForward(config)
        self.value_residual = config.value_residual
        self.embedding_residual = config.embedding_residual
        if config.embedding_residual:
            # Scales of the residual stream and of the embeddings (modded-nanogpt, 2024-11-06 on).
            self.residual_scales = nn.Parameter(torch.empty(2))

    @recompute_block
    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: AnyLayerCache | None = None,
        x0: Tensor | None = None,
        value_residual: Tensor | None = None,
        cuda_mask: CudaMask | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One block.

        Args:
            x: the residual stream, ``[B, T, C]``.
            rotary, cache, cuda_mask: as in :class:`Attention`.
            x0: the embeddings, ``[B, T, C]``; read if the config has an embedding residual.
            value_residual: values of the first layer, ``[B, T, K * D]``; None in that layer.

        Returns:
            The residual stream after this block, and the value residual of the next one.
        """
        if x0 is not None and self.embedding_residual:
            of_stream, of_embedding = self.residual_scales.unbind()
            wide = self.residual_scales.dtype
            x = (of_stream * x.to(wide) + of_embedding * x0.to(wide)).to(x.dtype)
        mixed, values = self.attention(
            x, self.attention_norm, rotary, cache, value_residual, cuda_mask
        )
        x = x + mixed
        # Do not rebind value_residual: attention reads it again when it is recomputed.
        next_value_residual = value_residual
        if self.value_residual == "first_layer" and value_residual is None:
            next_value_residual = values
        return x + self.feed_forward(x, self.feed_forward_norm), next_value_residual


class Transformer(LanguageModel):
    """Language model over token ids; the embedding is tied to the output head.

    Args:
        config: shape of the model.
        vocab_size: number of token ids, V.
        seed: seed of the initial weights, see :func:`initialize_weights`.
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.compiled = False
        self.embedding = nn.Embedding(vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        initialize_weights(self, config.n_layer, seed)

    @property
    def head_weight(self) -> Tensor:
        """The head is tied to the embedding."""
        return self.embedding.weight

    def compile_blocks(self) -> None:
        """Compile the blocks in place, which keeps names in checkpoints, and the head's softmax where
        that pays."""
        self.compiled = True
        # It would warn of operations in place, whose results nothing outside of a block reads.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        set_tuning()
        for block in self.blocks:
            block.compile(dynamic=False)

    def block_matrices(self) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """The blocks' weight matrices, each with the rows of the projections that it fuses."""
        for block in self.blocks:
            for matrix in self.config.matrices():
                yield block.get_parameter(f"{matrix.name}.weight"), matrix.parts

    def hidden_states(self, tokens: Tensor, cache: AnyKVCache | None = None) -> Tensor:
        """Final normed states ``[B, T, C]`` of ``tokens [B, T]`` (int64).

        With a cache the tokens continue the positions already in it, and the cache grows.
        """
        rotary = rope_cos_sin(self.config, positions_of(tokens, cache))
        x = x0 = self.embedding(tokens).to(self._residual_dtype())
        value_residual: Tensor | None = None
        masks: list[CudaMask | None] = [None] * len(self.blocks)
        if cache is None:  # which has an attention of its own
            masks = cuda_masks(self.config.layer_patterns, tokens, self.config.head_size)
        for layer, block in enumerate(self.blocks):
            layer_cache = cache.layers[layer] if cache is not None else None
            x, value_residual = block(x, rotary, layer_cache, x0, value_residual, masks[layer])
        if cache is not None:
            cache.length += tokens.shape[1]  # in place, where it is a tensor
        return self.norm(x)

    def _residual_dtype(self) -> torch.dtype:
        """Of the residual stream; wider products would widen a narrow one."""
        weight = self.embedding.weight
        narrow = self.config.residual_dtype == "bfloat16"
        return (
            torch.bfloat16 if narrow and compute_dtype(weight) == torch.bfloat16 else weight.dtype
        )

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or the training loss where ``targets`` are given.

        Args:
            tokens: ``[B, T]`` int64.
            targets: the token after each position, ``[B, T]`` int64.

        Returns:
            Without targets the logits ``[B, T, V]``. With targets the mean cross-entropy in nats, a
            float32 scalar; the logits of all positions are never in memory at once.
        """
        hidden = self.hidden_states(tokens)
        if targets is None:
            return self.logits(hidden)
        weight, hidden = self.embedding.weight, hidden.flatten(0, 1)
        total = linear_cross_entropy(hidden, weight, targets.flatten(), self.compiled)
        return total / targets.numel()
