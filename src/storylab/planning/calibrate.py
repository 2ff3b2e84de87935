"""What this machine does: a few real training steps on random tokens instead of a card's limits."""

from __future__ import annotations

from dataclasses import dataclass

from storylab.config import TrainConfig
from storylab.training.measure import StepTimer

# Steps are repeated for about this long.
SECONDS = 20.0


@dataclass(frozen=True)
class Measured:
    """Seconds of a micro-batch and of an update, and peak memory in bytes."""

    micro_batch: float
    update: float
    memory: float

    def seconds(self, config: TrainConfig) -> float:
        """Predicted training time of a whole run, evaluations left out."""
        iteration = config.gradient_accumulation_steps * self.micro_batch + self.update
        return (config.max_iters + 1) * iteration


def calibrate(config: TrainConfig, vocab_size: int) -> Measured:
    """Train steps of one and of two micro-batches; what the second adds is a micro-batch.

    Raises:
        UserError: this machine has not got the device or precision.
    """
    timer = StepTimer(config, vocab_size)
    one, two = (timer.median(count * config.batch_size, SECONDS / 2, least=3) for count in (1, 2))
    micro_batch = max(two - one, one / 2)
    return Measured(micro_batch, max(one - micro_batch, 0.0), timer.memory())
