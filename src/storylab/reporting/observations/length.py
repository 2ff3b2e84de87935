"""Observations on the length of training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from storylab.experiments.curves import HORIZON, PLATEAU_GAIN, Extrapolation, extrapolate
from storylab.experiments.measures import curve_after_warmup
from storylab.experiments.outcome import CellResult, Outcome
from storylab.experiments.statistics import mean_interval


def length_observations(outcome: Outcome) -> Iterable[str]:
    """Whether the loss plateaus: fitted curves, how much they disagree, and how they did on the
    second half of the curve from the first."""
    for cell in outcome.cells:
        if not cell.arm.finished:
            continue
        found = [extrapolate(*curve_after_warmup(run)) for run in cell.arm.finished]
        known = [each for each in found if each]
        if len(known) < len(found):
            points = len(curve_after_warmup(cell.arm.finished[0])[0])
            yield (
                f"{cell.name}: {points} evaluations after the warm-up are too few for a fitted curve."
            )
            continue
        yield f"{cell.name}: {_doubling(known)} {_held_out(known)} {_plateau(known)} {_epochs(cell)}"


def _doubling(found: Sequence[Extrapolation]) -> str:
    gains = [each.doubling_gains for each in found]
    known = [of_seed for of_seed in gains if of_seed]
    if len(known) < len(gains):
        return "no power law fits every seed's curve, so another doubling is not predicted."
    means = [float(np.mean(of_start)) for of_start in zip(*known, strict=True)]
    begun = found[0].begun
    return (
        f"another doubling is predicted to bring {means[0]:.3f} nats, by a power law fitted to each "
        f"seed's curve after the warm-up; {min(means):.3f} to {max(means):.3f} by fits that begin at "
        f"iterations {begun[0]:,} to {begun[-1]:,}."
    )


def _held_out(found: Sequence[Extrapolation]) -> str:
    predicted = [each.predicted_gain for each in found if each.predicted_gain is not None]
    measured = [each.measured_gain for each in found if each.measured_gain is not None]
    if len(predicted) < len(found):
        return "The first half of the curve is too short or too uneven to check such a prediction."
    errors = [a - b for a, b in zip(predicted, measured, strict=True)]
    interval = mean_interval(errors)
    span = f" (95 % CI {interval.low:+.3f} to {interval.high:+.3f} over seeds)" if interval else ""
    return (
        f"The same fit to the first half alone predicted {float(np.mean(predicted)):.3f} nats for "
        f"the second half, and {float(np.mean(measured)):.3f} were measured: off by "
        f"{float(np.mean(errors)):+.3f}{span}."
    )


def _plateau(found: Sequence[Extrapolation]) -> str:
    title = f"A plateau (a doubling brings less than {PLATEAU_GAIN:g} nats)"
    plateaus = [each.plateaus for each in found]
    known = [of_seed for of_seed in plateaus if of_seed]
    if len(known) < len(plateaus):
        return (
            f"{title} is not predicted: beyond {HORIZON} times the run by one of the fits or more."
        )
    # Iterations to a plateau differ by factors, so they are averaged as logarithms.
    means = [math.exp(float(np.mean(np.log(of_start)))) for of_start in zip(*known, strict=True)]
    reached = max(max(of_seed) for of_seed in known) <= found[0].end
    verb = "was reached by all fits" if reached else "is predicted"
    return f"{title} {verb}, at iteration {min(means):,.0f} to {max(means):,.0f} over the fits."


def _epochs(cell: CellResult) -> str:
    gaps = [e[-1].val_loss - e[-1].train_loss for r in cell.arm.finished if (e := r.evaluations)]
    interval = mean_interval(gaps)
    span = f" (95 % CI {interval.low:+.3f} to {interval.high:+.3f})" if interval else ""
    return (
        f"{cell.arm.finished[0].results.epochs:.2f} epochs were seen; validation minus train loss at "
        f"the end is {float(np.mean(gaps)):+.3f}{span} nats."
    )
