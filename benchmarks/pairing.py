"""What pairing by seed is worth: how the losses of arms vary together with their baselines over the seeds.

python benchmarks/pairing.py runs
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from storylab.experiments.outcome import Outcome, load_outcome

# Nats. Arms that differ by less are judged by their noise.
SMALL = 0.1


@dataclass(frozen=True)
class Pairing:
    """An arm and its baseline over their common seeds.

    Attributes:
        arm: name, with its condition.
        seeds: number of common seeds.
        difference: mean of the arm's losses minus the baseline's, in nats.
        correlation: of the two.
        ratio: standard deviation of paired differences over that of unpaired ones.
    """

    arm: str
    seeds: int
    difference: float
    correlation: float
    ratio: float


def pairings(outcome: Outcome) -> Iterator[Pairing]:
    """Yield one for each arm with two seeds or more that its baseline has too."""
    for condition in outcome.conditions:
        cells = outcome.arms(condition)
        losses = {
            cell.arm.name: {run.config.seed: run.loss for run in cell.arm.finished}
            for cell in cells
        }
        baseline = losses[outcome.baseline]
        for cell in cells:
            own = losses[cell.arm.name]
            seeds = sorted(own.keys() & baseline.keys())
            if cell.arm.name != outcome.baseline and len(seeds) > 1:
                a, b = (np.array([side[seed] for seed in seeds]) for side in (own, baseline))
                unpaired = np.sqrt(a.var(ddof=1) + b.var(ddof=1))
                yield Pairing(
                    arm=cell.name,
                    seeds=len(seeds),
                    difference=float((a - b).mean()),
                    correlation=float(np.corrcoef(a, b)[0, 1]),
                    ratio=float((a - b).std(ddof=1) / unpaired),
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path)
    runs: Path = parser.parse_args().runs
    small = []
    for path in sorted((runs / "experiments").glob("*.json")):
        print(path.stem)
        for found in pairings(load_outcome(path)):
            print(
                f"  {found.arm:<36} {found.seeds} seeds, {found.difference:+.3f} nats, "
                f"correlation {found.correlation:.2f}, deviation {found.ratio:.2f}"
            )
            if abs(found.difference) < SMALL:
                small.append(found)
    if small:
        print(
            f"{len(small)} arms within {SMALL} nats, medians: correlation "
            f"{median(each.correlation for each in small):.2f}, deviation "
            f"{median(each.ratio for each in small):.2f}"
        )


if __name__ == "__main__":
    main()
