"""What this machine does: a few real training steps on random tokens instead of a card's limits."""

from __future__ import annotations

from storylab.config import TrainConfig
from storylab.training.measure import Measured, StepTimer

# Steps are repeated for about this long.
SECONDS = 20.0


def calibrate(config: TrainConfig, vocab_size: int) -> Measured:
    """What steps of a run take here.

    Raises:
        UserError: this machine has not got the device or precision.
    """
    return StepTimer(config, vocab_size).measured(SECONDS, least=3)
