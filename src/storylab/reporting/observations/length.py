"""Observations on the length of training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from storylab.experiments.curves import fit_power_law
from storylab.experiments.measures import curve_after_warmup
from storylab.experiments.outcome import Outcome
from storylab.experiments.statistics import mean_interval


def length_observations(outcome: Outcome) -> Iterable[str]:
    """Whether the loss plateaus: a fitted curve with its interval over seeds."""
    for cell in outcome.cells:
        if not cell.arm.finished:
            continue
        laws = [fit_power_law(*curve_after_warmup(run)) for run in cell.arm.finished]
        fitted = [law for law in laws if law]
        run = cell.arm.finished[0]
        if len(fitted) < len(laws):
            points = len(curve_after_warmup(run)[0])
            yield (
                f"{cell.name}: {points} evaluations after the warm-up are too few for a fitted curve."
            )
            continue
        gains = [law.doubling_gain(run.config.max_iters) for law in fitted]
        plateaus = [law.plateau for law in fitted]
        gaps = [
            e[-1].val_loss - e[-1].train_loss for r in cell.arm.finished if (e := r.evaluations)
        ]
        finite = [p for p in plateaus if math.isfinite(p)]
        plateau = (
            f"a plateau (a doubling brings less than 0.01 nats) is predicted at iteration "
            f"{float(np.mean(finite)):,.0f}{_span(finite, ',.0f')}"
            if len(finite) == len(plateaus)
            else "no plateau is predicted"
        )
        reached = all(p <= run.config.max_iters for p in plateaus)
        yield (
            f"{cell.name}: {'the loss has reached a plateau' if reached else 'no plateau yet'}. "
            f"A power law fitted to each seed's curve after the warm-up goes on to a floor of "
            f"{float(np.mean([law.floor for law in fitted])):.3f}"
            f"{_span([law.floor for law in fitted], '.3f')} nats; another doubling is predicted to "
            f"bring {float(np.mean(gains)):.3f}{_span(gains, '.3f')} nats; {plateau}. "
            f"{run.results.epochs:.2f} epochs were seen; validation minus train loss at the end "
            f"is {float(np.mean(gaps)):+.3f}{_span(gaps, '+.3f')} nats."
        )


def _span(values: Sequence[float], form: str) -> str:
    interval = mean_interval(values)
    if interval is None:
        return ""
    return f" (95 % CI {format(interval.low, form)} to {format(interval.high, form)})"
