"""Compare two arms along their curves: their losses after equal time, and their costs of an equal loss.

Both read the estimates on a few fixed windows, before the slower arm's learning rate has come down as far
as at its end: they describe the runs as they are, not what another schedule would reach.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from storylab.experiments import statistics
from storylab.experiments.comparison import EqualTime, Ratio, Reach
from storylab.model.cost import training_flops
from storylab.record.run import Run

Pairs = Sequence[tuple[Run, Run]]
# The interval of two ratios reaches from nothing to a thousandfold.
FEWEST_PAIRS = 3
# Loss against tokens or seconds: (cost, loss) in the order of training.
Curve = Sequence[tuple[float, float]]


def ratio_of(values: Sequence[tuple[float | None, float | None]]) -> Ratio | None:
    """Geometric mean of the ratios first / second with its interval; None if a value is missing."""
    known = [(x, y) for x, y in values if x and y]
    if not known or len(known) < len(values):
        return None
    value, low, high = statistics.ratio_interval([x for x, _ in known], [y for _, y in known])
    shown = len(known) >= FEWEST_PAIRS
    return Ratio(value, low if shown else None, high if shown else None, len(known))


def equal_time(arm: str, baseline: str, pairs: Pairs) -> EqualTime | None:
    """The difference at the time when the faster run of each pair ended; None where a curve has fewer than
    two points by then."""
    differences, progress = [], []
    slower_arm = 0
    for a, b in pairs:
        curves = [_curve(run, "seconds") for run in (a, b)]
        if min(len(curve) for curve in curves) < 2:
            return None
        ends = [curve[-1][0] for curve in curves]
        at = min(ends)
        if at < max(curve[0][0] for curve in curves):
            return None
        ours, theirs = (_loss_at(curve, at) for curve in curves)
        differences.append(ours - theirs)
        progress.append(at / max(ends))
        slower_arm += ends[0] > ends[1]
    if not differences:
        return None
    return EqualTime(
        float(np.mean(differences)),
        statistics.mean_interval(differences),
        float(np.mean(progress)),
        arm if 2 * slower_arm > len(pairs) else baseline,
    )


def reach(pairs: Pairs, with_seconds: bool) -> Reach | None:
    """How many times fewer tokens, FLOPs and seconds the arm needs for an equal loss: in each pair that at
    which the worse of the two ends.

    Args:
        pairs: runs of the arm and of the baseline with the same seed.
        with_seconds: whether the runs' times can be compared.

    Returns:
        None without pairs, or where a curve is at that loss before its first evaluation.
    """
    costs = [_costs(a, b) for a, b in pairs]
    tokens = ratio_of([(theirs["tokens"], ours["tokens"]) for ours, theirs in costs])
    flops = ratio_of([(theirs["flops"], ours["flops"]) for ours, theirs in costs])
    if tokens is None or flops is None:
        return None
    seconds = [(theirs["seconds"], ours["seconds"]) for ours, theirs in costs]
    return Reach(tokens, ratio_of(seconds) if with_seconds else None, flops)


def _costs(a: Run, b: Run) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Costs of each run of a pair up to the loss at which the worse of them ends."""
    ends = [run.evaluations[-1].val_loss for run in (a, b) if run.evaluations]
    nothing: dict[str, float | None] = dict.fromkeys(("tokens", "seconds", "flops"))
    if len(ends) < 2:
        return nothing, nothing
    found = []
    for run in (a, b):
        tokens = _cost_of(_curve(run, "tokens"), max(ends))
        vocab_size = run.data.tokenizer.vocab_size
        of_token = training_flops(run.config.model, vocab_size, run.config.block_size)
        found.append(
            {
                "tokens": tokens,
                "seconds": _cost_of(_curve(run, "seconds"), max(ends)),
                "flops": tokens and tokens * of_token,
            }
        )
    return found[0], found[1]


def _curve(run: Run, cost: str) -> list[tuple[float, float]]:
    return [(float(getattr(e, cost)), e.val_loss) for e in run.evaluations]


def _loss_at(curve: Curve, cost: float) -> float:
    costs, losses = zip(*curve, strict=True)
    return float(np.interp(math.log(cost), np.log(costs), losses))


def _cost_of(curve: Curve, loss: float) -> float | None:
    """The cost at which a curve first comes down to ``loss``; None if it begins below it."""
    for (before, higher), (after, lower) in itertools.pairwise(curve):
        if higher > loss >= lower:
            share = (higher - loss) / (higher - lower)
            return math.exp(math.log(before) + share * (math.log(after) - math.log(before)))
    return None
