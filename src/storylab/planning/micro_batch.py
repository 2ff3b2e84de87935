"""The size of micro-batches that suits a GPU's free memory."""

from __future__ import annotations

import dataclasses

import torch

from storylab.config import NATIVE_DTYPES, PRESETS, TrainConfig
from storylab.planning.roofline import memory_bytes
from storylab.training.ranks import ONE_PROCESS, Ranks

# Tokens in a micro-batch from which on a GPU gains nothing: on an H100 113M parameters run at 348,000 tok/s
# with 64 x 128 tokens, 392,000 with 256 x 128 and 398,000 with 512 x 128 (docs/gpu.md).
ENOUGH_TOKENS = 512 * 128
# Share of the free memory that the predicted peak may have; the rest is for its error, for sums and copies
# in float32, and for other programs.
SHARE = 0.6


def fitted(config: TrainConfig, free_bytes: float, processes: int = 1) -> TrainConfig:
    """The config with the longest micro-batches of use that fit into a GPU's free memory; the sequences
    of an iteration stay as they are.

    A micro-batch is a divisor of an iteration, so that all have one shape. Low precision stays as it is, as
    its memory is not predicted. Several processes get equally many of them, if they can, and at least one.
    """
    if config.dtype not in NATIVE_DTYPES:
        return config
    sequences, vocab_size = _sequences(config), PRESETS[config.preset].vocab_size
    most = min(sequences // processes, max(1, ENOUGH_TOKENS // config.block_size))
    shared = processes if sequences % processes == 0 else 1
    sizes = [size for size in range(1, most + 1) if sequences % (size * shared) == 0]
    fitting = [
        size
        for size in sizes
        if memory_bytes(_split(config, size), vocab_size) <= SHARE * free_bytes
    ]
    return _split(config, max(fitting, default=1))


def fitted_here(
    config: TrainConfig, device: torch.device, ranks: Ranks = ONE_PROCESS
) -> TrainConfig:
    """:func:`fitted` on a CUDA device, the fullest of those that ``ranks`` have; the config itself on any
    other."""
    if device.type != "cuda":
        return config
    used = torch.tensor(-float(torch.cuda.mem_get_info(device)[0]), dtype=torch.float64)
    ranks.largest([used])
    return fitted(config, -float(used), ranks.size)


def split_as(stored: TrainConfig, config: TrainConfig) -> TrainConfig:
    """The config with the micro-batches of ``stored`` where both have as many sequences an iteration."""
    same = _sequences(config) == _sequences(stored)
    return _split(config, stored.batch_size) if same else config


def _sequences(config: TrainConfig) -> int:
    return config.batch_size * config.gradient_accumulation_steps


def _split(config: TrainConfig, size: int) -> TrainConfig:
    steps = _sequences(config) // size
    return dataclasses.replace(config, batch_size=size, gradient_accumulation_steps=steps)
