"""Observations on single runs: convergence, throughput, spikes, failures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

import numpy as np

from storylab.experiments.attempts import MICROBATCH_NOTE
from storylab.experiments.outcome import Outcome
from storylab.record.run import Run

# A spike: a value over its neighbours' median by this many of their median absolute deviations
# (scaled to a normal distribution's standard deviation), and by at least this share of it.
SPIKE_DEVIATIONS, SPIKE_SHARE, SPIKE_WINDOW = 6.0, 0.1, 21


def spikes(values: Sequence[float]) -> list[int]:
    """Indices of values that exceed their neighbours by far."""
    found = []
    half = SPIKE_WINDOW // 2
    for i, value in enumerate(values):
        near = [*values[max(0, i - half) : i], *values[i + 1 : i + 1 + half]]
        if len(near) < half:
            continue
        middle = median(near)
        deviation = 1.4826 * median(abs(v - middle) for v in near)
        reach = max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * abs(middle))
        if value > middle + reach:
            found.append(i)
    return found


def run_observations(run: Run, name: str) -> Iterable[str]:
    """Convergence, train/validation gap, throughput, spikes and clipping of one run."""
    evaluations, iterations = run.evaluations, run.iterations
    title = f"{name}, seed {run.config.seed}"
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        text = (
            f"{title}: validation loss fell from {first.val_loss:.3f} at iteration "
            f"{first.iteration} to {last.val_loss:.3f} at {last.iteration}"
        )
        if len(evaluations) > 1:
            before = evaluations[-2]
            rate = (before.val_loss - last.val_loss) / (last.iteration - before.iteration)
            text += f", still by {100 * rate:.3f} nats per 100 iterations at the end"
        gap = last.val_loss - last.train_loss
        yield (
            f"{text}. Validation minus train loss is {gap:+.3f} nats at the end, after "
            f"{run.results.epochs:.2f} epochs."
        )
    speeds = [row.tokens_per_second for row in iterations[1:] or iterations]
    low, middle, high = np.percentile(speeds, [5, 50, 95])
    yield (
        f"{title}: throughput {middle:,.0f} tok/s (median; 90 % of iterations within {low:,.0f} to "
        f"{high:,.0f}, a spread of {(high - low) / middle:.0%})."
    )
    # A step that was skipped may have no loss, and has no gradient norm.
    losses = spikes([row.loss or 0.0 for row in iterations])
    norms = spikes([row.grad_norm or 0.0 for row in iterations])
    clipped = float(np.mean([row.clipped for row in iterations]))
    yield (
        f"{title}: {_counted(losses, 'loss spike')} and {_counted(norms, 'gradient-norm spike')} in "
        f"{len(iterations):,} iterations; the gradient was clipped in {clipped:.0%} of them."
    )


def _counted(indices: Sequence[int], what: str) -> str:
    if not indices:
        return f"no {what}"
    shown = ", ".join(str(i) for i in indices[:3]) + (", ..." if len(indices) > 3 else "")
    return f"{len(indices)} {what}{'s' * (len(indices) > 1)} (iteration {shown})"


def failures(outcome: Outcome) -> Iterable[str]:
    """Runs that did not finish, and those trained with smaller micro-batches than asked for."""
    for cell in outcome.cells:
        lost = [run for run in cell.arm.runs if not run.finished]
        if lost:
            reason = f": {lost[0].reason}" if lost[0].reason else ""
            states = ", ".join(dict.fromkeys(run.state for run in lost))
            yield f"{cell.name}: {len(lost)} of {len(cell.arm.runs)} runs {states}{reason}."
        for run in cell.arm.runs:
            if run.config.batch_size != cell.config.batch_size:
                why = (
                    " after running out of memory"
                    if (run.folder / MICROBATCH_NOTE).exists()
                    else ""
                )
                yield (
                    f"{cell.name}, seed {run.config.seed}: micro-batches of {run.config.batch_size} "
                    f"sequences instead of {cell.config.batch_size}{why}; the same tokens an iteration."
                )
