"""Checkpoints of llama2.c, written by the published layout (export.py of github.com/karpathy/llama2.c)."""

from __future__ import annotations

import struct

import numpy as np

from score_tokenizers import VOCABULARY

DIM, HIDDEN, LAYERS, HEADS, CONTEXT = 32, 40, 2, 4, 24
Weights = dict[str, np.ndarray]


def draw(kv_heads: int, shared: bool) -> Weights:
    """Weights by the names of llama2.c's model.py, those of all layers in one array."""
    draws = np.random.default_rng(5)
    keys = kv_heads * DIM // HEADS
    shapes = {
        "tok_embeddings": (VOCABULARY, DIM),
        "attention_norm": (LAYERS, DIM),
        "wq": (LAYERS, DIM, DIM),
        "wk": (LAYERS, keys, DIM),
        "wv": (LAYERS, keys, DIM),
        "wo": (LAYERS, DIM, DIM),
        "ffn_norm": (LAYERS, DIM),
        "w1": (LAYERS, HIDDEN, DIM),
        "w2": (LAYERS, DIM, HIDDEN),
        "w3": (LAYERS, HIDDEN, DIM),
        "norm": (DIM,),
    }
    if not shared:
        shapes["output"] = (VOCABULARY, DIM)
    return {name: draws.normal(0, 0.3, shape).astype("<f4") for name, shape in shapes.items()}


def angles(positions: int) -> np.ndarray:
    size = DIM // HEADS
    return np.outer(np.arange(positions), 10000.0 ** -(np.arange(0, size, 2) / size))


def legacy(weights: Weights, kv_heads: int, base: float = 1.0) -> bytes:
    """``legacy_export``; a negative vocabulary means a head of its own. ``base`` scales the angles."""
    vocabulary = -VOCABULARY if "output" in weights else VOCABULARY
    order = "tok_embeddings attention_norm wq wk wv wo ffn_norm w1 w2 w3 norm".split()
    tables = [(function(angles(CONTEXT) * base)).astype("<f4") for function in (np.cos, np.sin)]
    parts = [*(weights[name] for name in order), *tables]
    parts += [weights["output"]] if "output" in weights else []
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, kv_heads, vocabulary, CONTEXT)
    return header + b"".join(part.tobytes() for part in parts)


def version_1(weights: Weights, kv_heads: int) -> bytes:
    """``version1_export``: a header of 256 bytes, then the norms first."""
    order = "attention_norm ffn_norm norm tok_embeddings wq wk wv wo w1 w2 w3 output".split()
    header = struct.pack("<Ii", 0x616B3432, 1)
    header += struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, kv_heads, VOCABULARY, CONTEXT)
    header += struct.pack("<B", "output" not in weights)
    return header.ljust(256, b"\0") + b"".join(weights[n].tobytes() for n in order if n in weights)
