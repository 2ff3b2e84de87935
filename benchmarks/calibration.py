"""Do the intervals hold what they promise on real runs?

    storylab experiment run benchmarks/calibration.toml --seeds 40 --runs calibration-runs
    python benchmarks/calibration.py calibration-runs

Equal recipes: many runs of one recipe with different seeds, dealt at random into two arms of a few
runs each. Whatever the two arms differ in is noise, so at most 5 % of the verdicts may be "better" or
"worse". Unequal recipes: an arm whose true difference is known, closely, from all its seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from msgspec import structs

from storylab.experiments.compare import compare_arms
from storylab.experiments.comparison import BETTER, WORSE, Arm
from storylab.experiments.outcome import load_outcome
from storylab.experiments.records import experiment_records
from storylab.experiments.statistics import (
    ALPHA,
    detectable_difference,
    mean_interval,
    power,
    story_interval,
)
from storylab.record.run import Run

DRAWS = 2000
FOUND = (BETTER, WORSE)


def with_seed(run: Run, seed: int) -> Run:
    """The run under another seed's name, so that two runs of different seeds make a pair."""
    config = dataclasses.replace(run.config, seed=seed, data_seed=seed)
    # Their weights and first batches do differ: here that is the noise to be measured.
    environment = structs.replace(run.environment, initial_weights_sha256="", first_batch_sha256="")
    return dataclasses.replace(run, config=config, environment=environment)


def false_positives(
    runs: list[Run], size: int, paired: bool, rng: np.random.Generator, draws: int = DRAWS
) -> float:
    """Share of comparisons between two arms of the same recipe that name a winner."""
    wrong = 0
    for _ in range(draws):
        chosen = [runs[i] for i in rng.permutation(len(runs))[: 2 * size]]
        if paired:
            chosen = [with_seed(run, i % size) for i, run in enumerate(chosen)]
        a, b = Arm("a", tuple(chosen[:size])), Arm("b", tuple(chosen[size:]))
        wrong += compare_arms(a, b, frozenset()).verdict in FOUND
    return wrong / draws


def false_positives_of_one_run(
    runs: list[Run], baselines: int, rng: np.random.Generator, draws: int = DRAWS
) -> float:
    """The same for an arm of one run, against a baseline of several runs of which one has its seed:
    as `storylab compare` and the report do it."""
    wrong = 0
    for _ in range(draws):
        chosen = [runs[i] for i in rng.permutation(len(runs))[: 1 + baselines]]
        baseline = Arm("b", tuple(with_seed(run, i) for i, run in enumerate(chosen[1:])))
        arm = Arm("a", (with_seed(chosen[0], 0),))
        wrong += compare_arms(arm, baseline, frozenset()).verdict in FOUND
    return wrong / draws


def found(differences: list[float], size: int, rng: np.random.Generator) -> float:
    """Share of draws of ``size`` pairs that tell the difference from none."""
    draws = [rng.choice(differences, size, replace=False) for _ in range(DRAWS)]
    intervals = [mean_interval(list(draw)) for draw in draws]
    return float(np.mean([interval.p < ALPHA for interval in intervals if interval]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="the folder given as --runs")
    (record,) = experiment_records(parser.parse_args().runs)
    outcome = load_outcome(record)
    base, arm = (list(cell.arm.finished) for cell in outcome.cells)
    rng = np.random.default_rng(0)
    losses = np.array([run.loss for run in base])
    print(
        f"{len(base)} seeds of one recipe: loss {losses.mean():.4f}, deviation {losses.std(ddof=1):.4f}"
    )
    half = len(base) // 2
    differences = losses[:half] - losses[half : 2 * half]
    interval = mean_interval(list(differences))
    assert interval is not None
    print(
        f"{half} pairs of different seeds at once: {interval.estimate:+.4f} nats "
        f"({interval.low:+.4f} to {interval.high:+.4f}), p {interval.p:.2f}"
    )
    print(f"winners named between equal recipes, {DRAWS} random draws (at most 5 % is promised):")
    for size in (2, 3, 5):
        for paired in (True, False):
            share = false_positives(base, size, paired, rng)
            print(f"  {size} runs an arm, {'paired' if paired else 'unpaired'}: {share:.1%}")
    for baselines in (2, 3, 5):
        share = false_positives_of_one_run(base, baselines, rng)
        print(f"  1 run, against {baselines} of the baseline: {share:.1%}")
    apart = 0
    for a, b in zip(base[:half], base[half:], strict=False):
        stories = story_interval(a.story_losses[:, 0], b.story_losses[:, 0], a.story_losses[:, 1])
        apart += stories is not None and stories.p < 0.05
    print(
        f"pairs whose two models differ on the stories (the other question): {apart} of {half}; "
        "no verdict is made from it"
    )
    theirs = {run.seeds: run.loss for run in base}
    paired_differences = [run.loss - theirs[run.seeds] for run in arm if run.seeds in theirs]
    truth, spread = float(np.mean(paired_differences)), float(np.std(paired_differences, ddof=1))
    print(
        f"a true difference of {truth:+.4f} nats (mean of {len(paired_differences)} pairs, deviation "
        f"{spread:.4f}):"
    )
    for size in (2, 3, 5, 8):
        print(
            f"  {size} pairs of seeds: found in {found(paired_differences, size, rng):.0%} of draws, "
            f"stated power {power(truth, spread, size):.0%}"
        )
    print("the same pairs moved to the difference that is stated to be found in 80 % of cases:")
    for size in (3, 5, 8):
        wanted = detectable_difference(spread, size)
        moved = [difference - truth + wanted for difference in paired_differences]
        print(f"  {size} pairs of seeds, {wanted:.4f} nats: found in {found(moved, size, rng):.0%}")


if __name__ == "__main__":
    main()
