"""Models of every class to export, with the record of one small run, for tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

import storylab
from samples import TINY
from storylab.config import ModelConfig, TrainConfig
from storylab.data.dataset import Dataset
from storylab.data.tokenizer import Tokenizer
from storylab.export.exporter import Source
from storylab.model.transformer import Transformer
from storylab.record.run import Run

# Grouped heads, an odd base of the rotary angles, and a width that Q8_0 packs.
SHAPE = ModelConfig(n_layer=3, n_head=4, n_kv_head=2, n_embd=64, n_hidden=96, rope_base=500.0)
CONTEXT = 96
# The class of each model, by the changes to the shape.
CLASSES: dict[str, tuple[dict[str, Any], ...]] = {
    "LlamaForCausalLM": ({}, {"n_kv_head": 4, "rope_base": 10000.0}, {"n_kv_head": 1}),
    "MistralForCausalLM": ({"attention": "window:16"}, {"attention": "window:2"}),
    "CwmForCausalLM": ({"attention": "window:16*2,full"},),
    "Qwen3ForCausalLM": (
        {"qk_norm": True},
        {"qk_norm": True, "attention": "window:16"},
        {"qk_norm": True, "attention": "full,window:16"},
    ),
}
CASES = [(name, changes) for name, cases in CLASSES.items() for changes in cases]


def source(run: Run, tokenizer: Tokenizer, **changes: Any) -> Source:
    """A model of a shape, its weights and gains far from where they begin, as the result of ``run``."""
    config = dataclasses.replace(SHAPE, **changes)
    model = Transformer(config, tokenizer.vocab_size, seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    trained = dataclasses.replace(run.config, model=config, block_size=CONTEXT)
    return Source(dataclasses.replace(run, config=trained), "last", model, tokenizer)


def train_small(dataset: Dataset, folder: Path) -> Run:
    """A finished run of 30 iterations, which is enough for tokens that are clearly the most likely."""
    return storylab.train(
        TrainConfig(
            model=TINY,
            data_dir=dataset.folder,
            out_dir=folder,
            dtype="float32",
            max_iters=30,
            batch_size=8,
            gradient_accumulation_steps=1,
            block_size=48,
            learning_rate=1e-2,
            warmup_iters=2,
            eval_interval=30,
            eval_iters=1,
            device="cpu",
        )
    )
