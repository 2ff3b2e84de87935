"""The average of the weights against a running mean by hand."""

from __future__ import annotations

import torch

from samples import TINY
from stepping import FLOAT32, VOCAB, batch
from storylab.config import TrainConfig
from storylab.training.state import TrainState


def test_averaged_weights_are_a_running_mean_that_forgets() -> None:
    """Plain mean of the first weights, exponential from as many as the share holds, in float64."""
    config = TrainConfig(model=TINY, max_iters=9, ema_fraction=0.4, batch_size=8)
    trained = TrainState(config, VOCAB, FLOAT32)
    weight = trained.model.embedding.weight
    expected = torch.zeros_like(weight, dtype=torch.float64)
    for number in range(1, 11):
        trained.step(number - 1, batch(), learning_rate=1e-2)
        newest = 1 / min(number, 4)
        expected = (1 - newest) * expected + newest * weight.detach().double()
        own = weight.detach().clone()
        with trained.averaged():
            torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(weight, own)
