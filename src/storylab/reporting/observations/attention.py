"""Observations on attention windows."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from storylab.experiments.factors import patterns_in_effect
from storylab.experiments.outcome import Outcome


def windows_observations(outcome: Outcome) -> Iterable[str]:
    """The windows of every arm, and the loss differences in both halves of a sequence."""
    for cell in outcome.cells:
        if cell.arm.name == outcome.baseline:
            continue
        model, block = cell.config.model, cell.config.block_size
        reach = model.receptive_field
        shown = ", ".join(pattern.short for pattern in patterns_in_effect(cell.config))
        yield (
            f"{cell.name}: windows by layer {shown}; receptive field "
            f"{block if reach is None else min(reach, block)} of {block} positions."
        )
    for condition in outcome.conditions:
        baseline = {run.seeds: run for run in outcome.baseline_of(condition).arm.finished}
        for cell in outcome.arms(condition):
            # Paired by seed: another set of seeds would move a difference this small.
            pairs = [
                (run, baseline[run.seeds]) for run in cell.arm.finished if run.seeds in baseline
            ]
            tables = [
                a.position_losses - b.position_losses
                for a, b in pairs
                if len(a.position_losses) == len(b.position_losses) > 0
            ]
            if cell.arm.name == outcome.baseline or not tables:
                continue
            table = np.mean(tables, axis=0)
            half = len(table) // 2
            yield (
                f"{cell.name}: against {outcome.baseline} the targets in the first half of the window "
                f"differ by {float(table[:half].mean()):+.4f} nats, those in the second half by "
                f"{float(table[half:].mean()):+.4f} ({len(tables)} paired seeds)."
            )
