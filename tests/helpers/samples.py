"""A small model and a small experiment, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from storylab.config import ModelConfig, TrainConfig
from storylab.data.dataset import Dataset

MakeConfig = Callable[..., TrainConfig]
TINY = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48)


def tiny(dataset: Dataset, out: Path, **changes: Any) -> TrainConfig:
    """A config of a two-layer model that trains 8 iterations; keywords change single values."""
    values: dict[str, Any] = {
        "model": TINY,
        "data_dir": dataset.folder,
        "out_dir": out,
        "dtype": "float32",
        "max_iters": 8,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "block_size": 16,
        "learning_rate": 1e-2,
        "warmup_iters": 2,
        "eval_interval": 4,
        "eval_iters": 1,
        "log_interval": 2,
        "device": "cpu",
    }
    return TrainConfig(**(values | changes))


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

# Two arms that train in a moment, with planned looks and a margin.
TWO_RATES = """
title = "Two rates"
purpose = "Which is better?"
hypothesis = "The high one"
factor = "learning_rate"
baseline = "low"
seeds = [1, 2]
looks = [2, 3]
margin = 0.02
[config]
preset = "nano"
n_layer = 1
n_head = 1
n_kv_head = 1
n_embd = 16
n_hidden = 16
dtype = "float32"
max_iters = 3
batch_size = 4
gradient_accumulation_steps = 1
block_size = 16
warmup_iters = 2
eval_interval = 3
eval_iters = 1
device = "cpu"
[arms]
low = { learning_rate = 1e-3 }
high = { learning_rate = 1e-2 }
"""
