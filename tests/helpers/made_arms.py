"""Arms whose runs have given losses, made of one finished run, for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from msgspec import structs

from storylab.experiments.comparison import Arm
from storylab.record.run import Run

RATES = frozenset({"learning_rate"})


def made(result: Run, losses: list[float], name: str = "arm", **config: Any) -> Arm:
    """An arm whose runs, seeds 1 on, have these losses: every story's loss per token is the same."""
    runs = []
    for seed, loss in enumerate(losses, start=1):
        stories = result.story_losses.copy()
        stories[:, 0] = loss * stories[:, 1]
        validation = structs.replace(result.validation, loss=loss)
        runs.append(
            dataclasses.replace(
                result,
                config=dataclasses.replace(result.config, seed=seed, data_seed=seed, **config),
                summary=structs.replace(result.results, validation=validation),
                story_losses=stories,
            )
        )
    return Arm(name, tuple(runs))
