"""Single training steps of a tiny model, for tests."""

from __future__ import annotations

from typing import Any

import torch

from samples import TINY
from storylab.config import TrainConfig
from storylab.model.transformer import Transformer
from storylab.optim.build import build_optimizers
from storylab.training.precision import ComputePolicy
from storylab.training.step import StepMetrics, training_step

FLOAT32 = ComputePolicy(torch.device("cpu"), torch.float32)
VOCAB = 300


def batch(sequences: int = 8, time: int = 17) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (sequences, time), generator=generator)


def step(
    model: Transformer, optimizers: list[torch.optim.Optimizer], **changes: Any
) -> StepMetrics:
    values: dict[str, Any] = {"micro_batch": 8, "learning_rate": 1e-2, "grad_clip": 1.0}
    precision = changes.pop("precision", FLOAT32)
    scaler = precision.grad_scaler()
    return training_step(
        model, optimizers, scaler, precision, changes.pop("batch", batch()), **(values | changes)
    ).read()


def new(**changes: Any) -> tuple[Transformer, list[torch.optim.Optimizer]]:
    model = Transformer(TINY, VOCAB, seed=0)
    return model, build_optimizers(model, TrainConfig(**changes))
