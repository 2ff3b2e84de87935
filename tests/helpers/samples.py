"""A small model and a small experiment, for tests."""

from __future__ import annotations

from collections.abc import Callable

from storylab.config import ModelConfig, TrainConfig

MakeConfig = Callable[..., TrainConfig]
TINY = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48)

# Two arms in low precision whose runs have a file of every kind; a test formats its seeds.
SMALL_EXPERIMENT = """
title = "Two rates"
purpose = "A small experiment."
factor = "learning_rate"
baseline = "low"
seeds = [{seeds}]
[config]
preset = "nano"
n_layer = 1
n_head = 1
n_kv_head = 1
n_embd = 16
n_hidden = 16
dtype = "fp8"
backend = "emulated"
quantization_stats = true
max_iters = 4
batch_size = 4
gradient_accumulation_steps = 1
block_size = 16
min_lr = 0.0
warmup_iters = 2
eval_interval = 2
eval_iters = 1
device = "cpu"
[arms]
low = {{ learning_rate = 1e-3 }}
high = {{ learning_rate = 1e-2 }}
"""
