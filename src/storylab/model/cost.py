"""Arithmetic of a model by part of a step: FLOPs from its matrices and its attention patterns.

Plans (:mod:`storylab.planning.roofline`) and profiles (:mod:`storylab.training.measure`) divide a
step into the same parts, :class:`StepPart`. This module does not load torch.
"""

from __future__ import annotations

from enum import StrEnum

from storylab.config import ModelConfig

# Positions in a block that attention on a GPU skips as a whole, and so the longest sequence in which a
# window saves nothing there (the blocks of FlexAttention and, for heads of 64, of flash attention).
SKIPPED_BLOCK = 128


class StepPart(StrEnum):
    """A part of a training step, predicted or measured; the value is its name in tables."""

    LINEAR = "linear layers"
    ATTENTION = "attention"
    ELEMENTWISE = "norms, rotary positions, gates, residuals"
    HEAD = "head and loss"
    CASTS = "casts and copies"
    QUANTIZING = "quantizing"
    UPDATE = "optimizer"


def linear_flops(config: ModelConfig) -> int:
    """FLOPs a token in one product (the forward product, say) of one block's linear layers."""
    return sum(2 * matrix.size for matrix in config.matrices())


def linear_features(config: ModelConfig) -> int:
    """Features that one block's linear layers read and write for a token."""
    return sum(matrix.n_in + matrix.n_out for matrix in config.matrices())


def head_flops(config: ModelConfig, vocab_size: int) -> int:
    """FLOPs a token in one product of the output head."""
    return 2 * config.n_embd * vocab_size


def attention_flops(config: ModelConfig, block_size: int) -> float:
    """FLOPs a token of the attention products of all blocks in the forward pass, the mean over the
    tokens of a sequence: scores and mixed values of the positions that a token reads."""
    total = 0.0
    for pattern in config.layer_patterns:
        total += 4 * config.n_embd * pattern.pairs(block_size) / block_size
    return total


def training_flops(config: ModelConfig, vocab_size: int, block_size: int) -> float:
    """FLOPs a token of all products of a training step, recomputed ones not counted: each product of
    the forward pass has two more for its gradients."""
    linear = config.n_layer * linear_flops(config) + head_flops(config, vocab_size)
    return 3 * (linear + attention_flops(config, block_size))
