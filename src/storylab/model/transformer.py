"""The transformer: the Llama architecture at small scale, in one plain module.

Shapes: B batch, T time (positions), C width (n_embd), H query heads, K key/value heads,
D head size, F hidden width of the feed-forward layer, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from storylab.compiler import set_tuning
from storylab.config import ModelConfig
from storylab.model.attention import block_masks, causal_attention
from storylab.model.head import linear_cross_entropy, token_losses

INIT_STD = 0.02
# Where parameters that only some configs have begin, by the end of their names.
STARTS: dict[str, float | tuple[float, ...]] = {
    "value_scale": 0.5,
    "residual_scales": (1.0, 0.0),
}
NORM_EPS = 1e-5


class LayerCache:
    """Keys and values of the positions that one layer has read, in ``[B, K, max_length, D]``."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device) -> None:
        self.keys = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[B, K, T, D]`` behind the filled positions; return all keys and values so far."""
        if self.length == 0:  # autocast decides the dtype of keys and values
            self.keys, self.values = self.keys.to(key.dtype), self.values.to(value.dtype)
        start, self.length = self.length, self.length + key.shape[2]
        self.keys[:, :, start : self.length] = key
        self.values[:, :, start : self.length] = value
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class WindowCache:
    """Keys and values that queries to come can still read: the last ``window - 1`` positions."""

    def __init__(self, window: int) -> None:
        self.kept = window - 1
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return what was kept and ``[B, K, T, D]`` behind it; keep the end of that."""
        if self.keys is not None and self.values is not None:
            key = torch.cat((self.keys, key), dim=2)
            value = torch.cat((self.values, value), dim=2)
        first = max(key.shape[2] - self.kept, 0)
        # Copies, or a view would hold on to the whole prompt.
        self.keys, self.values = key[:, :, first:].clone(), value[:, :, first:].clone()
        return key, value


class KeyValueCache:
    """What every layer needs of the positions so far, for generation one token at a time."""

    def __init__(
        self, config: ModelConfig, batch: int, max_length: int, device: torch.device
    ) -> None:
        shape = (batch, config.n_kv_head, max_length, config.head_size)
        self.length = 0
        """Positions read so far."""
        self.layers = [
            LayerCache(shape, device) if window is None else WindowCache(window)
            for window in config.layer_windows
        ]


def lean(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, keeping only ``x`` for the backward pass, which redoes what it needs.

    Meant for elementwise work that ends in a matrix product: redoing stops before that product,
    so what it costs is the elementwise part. On the CPU that is no slower than writing the
    intermediate results to memory and reading them back (docs/performance.md). Other devices
    keep everything, as not measured. A compiled block is lean as a whole, see :meth:`Block.forward`.
    """
    if redoing(x) and not torch.compiler.is_compiling():
        return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return function(x)


def redoing(x: Tensor) -> bool:
    """Whether what is computed of ``x`` is redone in a backward pass rather than kept for it."""
    return x.device.type == "cpu" and torch.is_grad_enabled()


def _keep_products(hidden: int) -> Any:
    """What a compiled block keeps for its backward pass: the results of its linear layers, but not
    that of the last one, which reads ``hidden`` features: it only joins the residual stream."""

    def policy(_: Any, operation: Any, *operands: Any, **__: Any) -> CheckpointPolicy:
        product = operation == torch.ops.aten.mm.default and operands[1].shape[0] != hidden
        return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, NORM_EPS)


def rotary_angles(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[T, D]`` of the rotary angles (Su et al. 2021, arXiv 2104.09864).

    Channel i of the first half of a head and channel i of the second half turn together by
    position * base^(-2i/D), the layout of Llama in `transformers`; both halves hold the same angles.
    """
    half = config.head_size // 2
    exponents = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    angles = positions.float().unsqueeze(1) * config.rope_base**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x [B, heads, T, D]`` by the rotary angles; the result has the dtype of ``x``."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), rotary positions.

    A query reads as many positions, its own included, as the window of the layer has.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.n_head, config.n_kv_head
        self.window, self.qk_norm = config.layer_windows[layer], config.qk_norm
        # Query, key and value rows in one matrix: one product instead of three, two of them thin.
        self.qkv = nn.Linear(config.n_embd, config.qkv_size, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if config.adds_values(layer):
            self.value_scale = nn.Parameter(torch.empty(()))

    def values(self, qkv: Tensor) -> Tensor:
        """The values ``[B, T, K * D]`` within ``qkv [B, T, (H + 2K) * D]``."""
        size = self.out.in_features // self.heads
        return qkv.split(((self.heads + self.kv_heads) * size, self.kv_heads * size), dim=-1)[1]

    def forward(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | WindowCache | None = None,
        more_values: Tensor | None = None,
        block_mask: BlockMask | None = None,
    ) -> Tensor:
        """Mix ``qkv [B, T, (H + 2K) * D]``, made by the layer of that name, over time: [B, T, C].

        ``more_values [B, T, K * D]`` are added to the values by the learned scale.
        """
        batch, time, _ = qkv.shape
        width = self.out.in_features
        heads = qkv.view(batch, time, -1, width // self.heads).transpose(1, 2)
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if more_values is not None:
            more = (self.value_scale * more_values).view(batch, time, self.kv_heads, -1)
            value = value + more.transpose(1, 2).to(value.dtype)
        if self.qk_norm:  # rotation keeps the length; autocast on CUDA widens norms to float32
            normed = (F.rms_norm(x, x.shape[-1:]).to(value.dtype) for x in (query, key))
            query, key = normed
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is not None:
            key, value = cache.append(key, value)
        mixed = causal_attention(query, key, value, self.window, block_mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=False)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, gate_up: Tensor) -> Tensor:
        """``gate_up [B, T, 2F]``, made by the layer of that name, to [B, T, C]."""
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
            # Of the residual stream and of the embeddings (modded-nanogpt, records of 2024-11-06 on).
            self.residual_scales = nn.Parameter(torch.empty(2))

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | WindowCache | None = None,
        embedded: Tensor | None = None,
        more_values: Tensor | None = None,
        block_mask: BlockMask | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream ``x [B, T, C]`` after this block, and what later blocks add to values.

        ``embedded [B, T, C]`` and ``more_values [B, T, K * D]`` are read where the config says so.
        """
        if torch.compiler.is_compiling() and redoing(x):
            return checkpoint(
                self._forward,
                *(x, rotary, cache, embedded, more_values, block_mask),
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=partial(_keep_products, self.feed_forward.down.in_features),
            )
        return self._forward(x, rotary, cache, embedded, more_values, block_mask)

    def _forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | WindowCache | None,
        embedded: Tensor | None,
        more_values: Tensor | None,
        block_mask: BlockMask | None,
    ) -> tuple[Tensor, Tensor | None]:
        if embedded is not None and self.embedding_residual:
            of_stream, of_embedding = self.residual_scales.unbind()
            x = of_stream * x + of_embedding * embedded
        qkv = lean(lambda x: self.attention.qkv(self.attention_norm(x)), x)
        x = x + lean(lambda qkv: self.attention(qkv, rotary, cache, more_values, block_mask), qkv)
        gate_up = lean(lambda x: self.feed_forward.gate_up(self.feed_forward_norm(x)), x)
        # Another name: what redoes the attention above reads the first one again.
        handed_on = more_values
        if self.value_residual == "first_layer" and more_values is None:
            handed_on = self.attention.values(qkv)
        return x + lean(self.feed_forward, gate_up), handed_on


class Transformer(nn.Module):
    """Language model over token ids; the embedding is tied to the output head.

    Args:
        config: shape of the model.
        vocab_size: number of token ids, V.
        seed: seed of the initial weights, drawn on the CPU so that every device starts alike.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.compiled = False
        self.embedding = nn.Embedding(vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """N(0, 0.02); what writes to the residual stream N(0, 0.02/sqrt(2L)); norm gains 1 (GPT-2).

        What is added by the options draws nothing, so that weights of one name begin alike with and
        without them.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            start = next((x for end, x in STARTS.items() if name.endswith(end)), None)
            if start is not None:
                parameter.copy_(torch.tensor(start))
                continue
            if parameter.dim() < 2:
                parameter.fill_(1.0)
                continue
            writes_residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            std = INIT_STD / math.sqrt(2 * self.config.n_layer) if writes_residual else INIT_STD
            parameter.normal_(0.0, std, generator=generator)

    def compile_blocks(self) -> None:
        """Compile the blocks in place, so that names in checkpoints stay as they are, and the head's
        softmax where it pays."""
        self.compiled = True
        # It would warn of operations in place, of which a block has none that anything else sees.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        set_tuning()
        for block in self.blocks:
            block.compile(dynamic=False)

    def block_matrices(self) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """The blocks' weight matrices, each with the rows of the projections that it joins."""
        config = self.config
        key_value = config.n_kv_head * config.head_size
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block.attention.qkv.weight, (config.n_embd, key_value, key_value)
            yield block.attention.out.weight, (config.n_embd,)
            yield block.feed_forward.gate_up.weight, (config.n_hidden, config.n_hidden)
            yield block.feed_forward.down.weight, (config.n_embd,)

    def hidden(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Final normed states ``[B, T, C]`` of ``tokens [B, T]`` (int64).

        With a cache the tokens continue the positions already in it, and the cache grows.
        """
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        rotary = rotary_angles(self.config, positions)
        x = embedded = self.embedding(tokens)
        more_values: Tensor | None = None
        # Sampling meets a new length at every token, for which FlexAttention would be compiled anew.
        windows = self.config.layer_windows if cache is None else [None] * len(self.blocks)
        masks = block_masks(windows, tokens.shape[1], tokens.device, self.config.head_size)
        for layer, block in enumerate(self.blocks):
            layer_cache = cache.layers[layer] if cache is not None else None
            x, more_values = block(x, rotary, layer_cache, embedded, more_values, masks[layer])
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of the token after each of the final states ``hidden [..., C]``."""
        return F.linear(hidden, self.embedding.weight)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits ``[B, T, V]`` of the token after each position of ``tokens [B, T]``."""
        return self.logits(self.hidden(tokens, cache))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats (float32 scalar) of ``targets [B, T]`` after ``tokens [B, T]``.

        The logits of all positions are never in memory at once.
        """
        hidden = self.hidden(tokens).flatten(0, 1)
        weight = self.embedding.weight
        total = linear_cross_entropy(hidden, weight, targets.flatten(), self.compiled)
        return total / targets.numel()

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of every position, ``[B, T]`` float32, without gradient."""
        with torch.no_grad():
            hidden = self.hidden(tokens).flatten(0, 1)
            losses = token_losses(hidden, self.embedding.weight, targets.flatten())
        return losses.view(targets.shape)
