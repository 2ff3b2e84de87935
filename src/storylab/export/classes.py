"""The classes of other programs that compute our models, and the names of our parts in them.

Our model is Llama's: RMSNorm before each part, rotary positions on halves of a head, SwiGLU, grouped
heads, a tied head. Two options have classes of their own:

====================  ==========================  ===================
attention             without QK norm             with QK norm
====================  ==========================  ===================
full                  ``LlamaForCausalLM``        ``Qwen3ForCausalLM``
a window everywhere   ``MistralForCausalLM``      ``Qwen3ForCausalLM``
window in some layers ``CwmForCausalLM``          ``Qwen3ForCausalLM``
====================  ==========================  ===================

A window of N is the query's own position and the N - 1 before it, here and in all four classes of
`transformers` (``sliding_window_overlay`` in its ``masking_utils.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from storylab.config import FULL, ModelConfig, Window
from storylab.errors import UserError
from storylab.model.layers import NORM_EPS

# The names of a block's matrices and norms: ours, and those of the projections that ours fuses, in order.
MATRICES = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "feed_forward.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.down": ("mlp.down_proj",),
}
BLOCK_NORMS = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
}
# The names outside of the blocks. The head is tied to the embedding, so it has no tensor of its own.
OUTSIDE = {"embedding": "model.embed_tokens", "norm": "model.norm"}
# The gains of Qwen3's norms of queries and keys. Ours have none, which is a gain of 1.
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
# transformers keeps the last N - 1 positions of a window of N as a slice from -(N - 1), which for a
# window of 1 is all of them.
SMALLEST_WINDOW = 2


@dataclass(frozen=True)
class ModelClass:
    """A class of `transformers`.

    Attributes:
        model_type: its name in ``config.json``.
        architecture: its name in Python.
        keys: the values of ``config.json`` that this class adds to those that all classes share.
    """

    model_type: str
    architecture: str
    keys: Callable[[ModelConfig], dict[str, Any]]


def window_size(config: ModelConfig) -> int | None:
    """The size of the model's windows; None if all layers are full. The model has one size
    (:func:`model_class`)."""
    return next((p.size for p in config.layer_patterns if isinstance(p, Window)), None)


def _layer_types(config: ModelConfig) -> list[str]:
    return [
        "full_attention" if pattern == FULL else "sliding_attention"
        for pattern in config.layer_patterns
    ]


def _qwen3_keys(config: ModelConfig) -> dict[str, Any]:
    size = window_size(config)
    return {
        "attention_bias": False,
        "layer_types": _layer_types(config),
        # Without use_sliding_window the class sets sliding_window to None, whatever layer_types says.
        "use_sliding_window": size is not None,
        "sliding_window": size,
        # Layers below this one are full where a program does not read layer_types.
        "max_window_layers": config.n_layer if size is None else 0,
    }


LLAMA = ModelClass(
    "llama", "LlamaForCausalLM", lambda config: {"attention_bias": False, "mlp_bias": False}
)
MISTRAL = ModelClass(
    "mistral", "MistralForCausalLM", lambda config: {"sliding_window": window_size(config)}
)
CWM = ModelClass(
    "cwm",
    "CwmForCausalLM",
    lambda config: {
        "mlp_bias": False,
        "sliding_window": window_size(config),
        "layer_types": _layer_types(config),
    },
)
QWEN3 = ModelClass("qwen3", "Qwen3ForCausalLM", _qwen3_keys)


def model_class(config: ModelConfig) -> ModelClass:
    """The class that computes a model of this shape.

    Raises:
        UserError: none does; the message gives the reason and the nearest shape that has one.
    """
    if fault := next(_without_class(config), None):
        raise UserError(f"no model class of transformers computes this model: {fault}")
    if config.qk_norm:
        return QWEN3
    if window_size(config) is None:
        return LLAMA
    return CWM if FULL in config.layer_patterns else MISTRAL


def _without_class(config: ModelConfig) -> Iterator[str]:
    """The parts of the model that no class has, each with the nearest that one has."""
    if config.value_residual != "none":
        yield (
            f"none adds the values of the first layer to later ones (value_residual "
            f"{config.value_residual}). Train with --value_residual none, or by --method portable, and "
            "export that run"
        )
    if config.embedding_residual:
        yield (
            "none adds the embeddings to every block by learned scales (embedding_residual). Train "
            "with --no-embedding_residual, or by --method portable, and export that run"
        )
    others = [p.label for p in config.layer_patterns if p != FULL and not isinstance(p, Window)]
    if others:
        yield f"none has {others[0]}. Train with --attention full or window:N, and export that run"
    sizes = sorted({p.size for p in config.layer_patterns if isinstance(p, Window)})
    if len(sizes) > 1:
        yield (
            f"none has windows of several sizes ({', '.join(map(str, sizes))}). Train with one size, "
            f"such as --attention window:{sizes[-1]}*3,full, and export that run"
        )
    if sizes and sizes[0] < SMALLEST_WINDOW:
        yield (
            "the cache of transformers keeps all positions for a window of 1. Train with --attention "
            f"window:{SMALLEST_WINDOW} or more, and export that run"
        )


def shared_keys(config: ModelConfig, vocab_size: int, block_size: int) -> dict[str, Any]:
    """The values of ``config.json`` that all classes have, without those of tokens and dtype."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": block_size,
        "rms_norm_eps": NORM_EPS,
        # transformers 5 reads the first, earlier versions and other programs the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
    }


def named_weights(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of the classes, fused matrices split into projections.

    Args:
        config: a shape that :func:`model_class` accepts.
        weights: the model's tensors by our names, float32.
    """
    named = {f"{theirs}.weight": weights[f"{ours}.weight"] for ours, theirs in OUTSIDE.items()}
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        for norm, name in BLOCK_NORMS.items():
            named[f"{theirs}.{name}.weight"] = weights[f"{ours}.{norm}.weight"]
        for matrix in config.matrices():
            parts = weights[f"{ours}.{matrix.name}.weight"].split(matrix.parts)
            for name, part in zip(MATRICES[matrix.name], parts, strict=True):
                named[f"{theirs}.{name}.weight"] = part
        if config.qk_norm:
            for name in QK_NORMS:
                named[f"{theirs}.{name}.weight"] = torch.ones(config.head_size)
    return named
