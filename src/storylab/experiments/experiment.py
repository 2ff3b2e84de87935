"""An experiment as types: its arms, conditions, seeds and expectations, with the config of every cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from storylab.config import GPT2_VOCAB_SIZE, TrainConfig, at_most
from storylab.data.prepare_config import PrepareConfig
from storylab.errors import UserError
from storylab.experiments.factorial import Factorial

# Numbers that an expectation may name.
METRICS = {
    "loss_difference": "val loss minus the baseline's, in nats",
    "speed_ratio": "tokens a second over the baseline's",
    "memory_ratio": "peak memory over the baseline's",
    "tokens_per_second": "tokens a second",
    "val_loss": "loss on the whole validation split, in nats",
    "plateau_iteration": "predicted iteration from which a doubling brings less than 0.01 nats",
}
MOST_SEEDS = 10_000
Variance = Literal["moderated", "own", "pooled"]
Stage = Literal["search", "confirm"]


def counted_up(seeds: Sequence[int], count: int) -> list[int]:
    """The first ``count`` of ``seeds``, which go on by counting up from the largest."""
    more = range(max(seeds) + 1, max(seeds) + 1 + count - len(seeds))
    return [*seeds, *more][:count]


@dataclass(frozen=True)
class Expectation:
    """A number that the hypothesis predicts, for comparison with the measured one."""

    text: str
    metric: str
    arm: str
    at_least: float | None = None
    at_most: float | None = None
    condition: str | None = None


@dataclass(frozen=True)
class Cell:
    """An arm under a condition, with the config of its runs except the seed."""

    condition: str
    arm: str
    config: TrainConfig


@dataclass(frozen=True)
class Experiment:
    """A checked experiment at one scale.

    ``conditions`` are compared separately, each with its own baseline; an experiment without
    conditions has the one named ``""``. ``matched`` names those conditions whose arms have the
    baseline's training compute instead of its number of tokens.
    """

    name: str
    file: str
    scale: str
    title: str
    purpose: str
    hypothesis: str
    note: str
    waits_for: str
    factor: str
    baseline: str
    arms: tuple[str, ...]
    conditions: tuple[str, ...]
    matched: tuple[str, ...]
    seeds: tuple[int, ...]
    looks: tuple[int, ...]
    """Numbers of seeds at which verdicts are made, increasing."""
    variance: Variance
    """How the noise of an arm's difference is estimated: ``moderated`` by the other arms, its ``own``
    alone, or ``pooled`` over all arms."""
    stage: Stage
    margin: float | None
    expectations: tuple[Expectation, ...]
    data: PrepareConfig
    cells: tuple[Cell, ...]
    factorial: Factorial | None = None
    """The design, where the arms are the cells of crossed factors."""

    @property
    def label(self) -> str:
        """Name of the experiment, its scale and a stage after the search, valid as a file name."""
        stage = "" if self.stage == "search" else self.stage
        return "-".join(part for part in (self.name, self.scale, stage) if part)

    def first_seeds(self, count: int | None) -> tuple[int, ...]:
        """The first ``count`` seeds of the file, or as many as it has; more count up from the largest.

        Raises:
            UserError: ``count`` is below 1, or more than anyone can train.
        """
        if count is None:
            return self.seeds
        if count < 1:
            raise UserError(f"seeds is {count}: it must be at least 1")
        at_most(MOST_SEEDS, "seeds", count)
        return tuple(counted_up(self.seeds, count))

    @property
    def vocab_size(self) -> int:
        """Token ids of the data set that the file describes."""
        kind, _, size = self.data.tokenizer.partition(":")
        return int(size) if kind == "bpe" else GPT2_VOCAB_SIZE

    def cell(self, condition: str, arm: str) -> Cell:
        """The cell of an arm under a condition."""
        return next(c for c in self.cells if (c.condition, c.arm) == (condition, arm))
