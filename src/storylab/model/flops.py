"""How much matrix multiplication a model does, by part."""

from __future__ import annotations

from storylab.config import ModelConfig, TrainConfig

# Compiling takes some 15 seconds and saves a sixth to a third of the time (docs/performance.md); this
# much work in the blocks is several minutes on two CPU cores.
COMPILE_FLOPS = 2e14

# Positions in a block that attention on a GPU skips as a whole, and so the longest sequence in which a
# window saves nothing there (FlexAttention's default block).
SKIPPED_BLOCK = 128


def linear_flops(config: ModelConfig) -> int:
    """FLOPs a token in one product (forward, say) of one block's linear layers."""
    attention = 2 * config.n_embd * (config.n_head + config.n_kv_head) * config.head_size
    return 2 * (attention + 3 * config.n_embd * config.n_hidden)


def head_flops(config: ModelConfig, vocab_size: int) -> int:
    """FLOPs a token in one product of the output head."""
    return 2 * config.n_embd * vocab_size


def attention_flops(config: ModelConfig, block_size: int) -> float:
    """FLOPs a token, forward, of the attention products of all blocks: scores and mixed values of the
    positions that a token reads, the mean over the tokens of a sequence."""
    total = 0.0
    for window in config.layer_windows:
        reach = min(window or block_size, block_size)
        # Tokens before the window is full read 1, 2, ... positions.
        positions = reach * (reach + 1) / 2 + (block_size - reach) * reach
        total += 4 * config.n_embd * positions / block_size
    return total


def training_flops(config: ModelConfig, vocab_size: int, block_size: int) -> float:
    """FLOPs a token of all products of a training step, what a method recomputes not counted: each
    product of the forward pass has two more for its gradients."""
    linear = config.n_layer * linear_flops(config) + head_flops(config, vocab_size)
    return 3 * (linear + attention_flops(config, block_size))


def worth_compiling(config: TrainConfig) -> bool:
    """Whether a run is long enough to win back the time that compiling its blocks takes.

    A matter of the config and not of the machine, so that the same run is computed in the same way.
    """
    flops = training_flops(config.model, 0, config.block_size)  # the head is not compiled
    return flops * config.total_tokens >= COMPILE_FLOPS
