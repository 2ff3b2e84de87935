"""Key observations: statements computed from the runs, each with its numbers.

A figure is measured unless the sentence says that it is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median

import numpy as np

from storylab.config import GPT2_VOCAB_SIZE, TrainConfig
from storylab.experiments.attempts import MICROBATCH_NOTE
from storylab.experiments.comparison import EQUIVALENT
from storylab.experiments.curves import fit_power_law, parabola_minimum
from storylab.experiments.experiment import METRICS
from storylab.experiments.factors import patterns_in_effect, under
from storylab.experiments.outcome import CellResult, Checked, Outcome, curve_after_warmup
from storylab.experiments.results import ENDED, Result
from storylab.experiments.statistics import mean_interval
from storylab.experiments.verdicts import nats
from storylab.planning.gpus import GPUS
from storylab.planning.plan_text import can_run
from storylab.planning.roofline import gains
from storylab.planning.software import SOFTWARE
from storylab.precision.edit import find_recipe
from storylab.reporting.series import (
    low_precision_share,
    quantization_rows,
    time_and_loss_front,
)
from storylab.training.lines import duration

# A spike: a value over its neighbours' median by this many of their median absolute deviations
# (scaled to a normal distribution's standard deviation), and by at least this share of it.
SPIKE_DEVIATIONS, SPIKE_SHARE, SPIKE_WINDOW = 6.0, 0.1, 21
# A size counts as good as the best if its loss is within this many nats of it.
GOOD_ENOUGH = 0.02
# The record's own card.
PLANNED_GPU = GPUS["rtx5090"]


def observations(outcome: Outcome) -> list[str]:
    """What an experiment's runs show, a sentence or two each."""
    found: list[str] = []
    told = set()
    for condition in outcome.conditions:
        cell = outcome.baseline_of(condition)
        if cell.arm.finished and cell.arm.finished[0].folder not in told:
            told.add(cell.arm.finished[0].folder)
            found += _of_run(cell.arm.finished[0], cell.name)
    found += _BY_FACTOR.get(outcome.factor, lambda outcome: [])(outcome)
    found += _failures(outcome)
    return [*found, *(expectation_text(check) for check in outcome.expectations)]


def expectation_text(check: Checked) -> str:
    """An expectation, the number it was held against, and by how much it was met or missed."""
    e = check.expectation
    title = f"Hypothesis ({under(e.arm, check.condition)}): {e.text}"
    if check.value is None:
        return f"{title} - not measured."
    span = ""
    if check.low is not None and check.high is not None:
        span = f" (95 % CI {check.low:.4g} to {check.high:.4g})"
    value = f"{check.value:.4g}" if math.isfinite(check.value) else "none is seen coming"
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in (("at least", e.at_least), ("at most", e.at_most))
        if bound is not None
    ]
    missed = check.missed_bound
    by = f", missed by {abs(check.value - missed):.4g}" if missed is not None else ""
    if check.met is None:
        answer, by = "can't tell, the bound lies within the interval", ""
    else:
        answer = "met" if check.met else "not met"
    if not math.isfinite(check.value):
        by = ""
    return (
        f"{title} - {answer}: {METRICS[e.metric]}: {value}{span}, expected "
        f"{' and '.join(bounds)}{by}."
    )


def spikes(values: Sequence[float]) -> list[int]:
    """Indices of values that stand out above the neighbours around them."""
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


def _of_run(run: Result, name: str) -> Iterable[str]:
    """Convergence, train/validation gap, throughput, spikes and clipping of one run."""
    evaluations, iterations = run.evaluations, run.iterations
    title = f"{name}, seed {run.config.seed}"
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        text = (
            f"{title}: validation loss fell from {first['val_loss']:.3f} at iteration "
            f"{first['iteration']} to {last['val_loss']:.3f} at {last['iteration']}"
        )
        if len(evaluations) > 1:
            before = evaluations[-2]
            rate = (before["val_loss"] - last["val_loss"]) / (
                last["iteration"] - before["iteration"]
            )
            text += f", still by {100 * rate:.3f} nats per 100 iterations at the end"
        gap = last["val_loss"] - last["train_loss"]
        yield (
            f"{text}. Validation minus train loss is {gap:+.3f} nats at the end, after "
            f"{run.summary['epochs']:.2f} epochs."
        )
    speeds = [row["tokens_per_second"] for row in iterations[1:] or iterations]
    low, middle, high = np.percentile(speeds, [5, 50, 95])
    yield (
        f"{title}: throughput {middle:,.0f} tok/s (median; 90 % of iterations within {low:,.0f} to "
        f"{high:,.0f}, a spread of {(high - low) / middle:.0%})."
    )
    losses = spikes([row["loss"] for row in iterations])
    # A float16 step that was skipped has no gradient norm.
    norms = spikes([row["grad_norm"] or 0.0 for row in iterations])
    clipped = float(np.mean([row["clipped"] for row in iterations]))
    yield (
        f"{title}: {_counted(losses, 'loss spike')} and {_counted(norms, 'gradient-norm spike')} in "
        f"{len(iterations):,} iterations; the gradient was clipped in {clipped:.0%} of them."
    )


def _counted(indices: Sequence[int], what: str) -> str:
    if not indices:
        return f"no {what}"
    shown = ", ".join(str(i) for i in indices[:3]) + (", ..." if len(indices) > 3 else "")
    return f"{len(indices)} {what}{'s' * (len(indices) > 1)} (iteration {shown})"


def _failures(outcome: Outcome) -> Iterable[str]:
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


def _of_windows(outcome: Outcome) -> Iterable[str]:
    """Windows in effect, and at which lengths they pay."""
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


def _of_sizes(outcome: Outcome) -> Iterable[str]:
    """The Pareto front, and the best trade by criteria that are named."""
    front = time_and_loss_front(outcome)
    if not front:
        return
    told = "; ".join(f"{cell.name} ({duration(time)}, {loss:.3f})" for cell, time, loss in front)
    yield f"No other arm has both less training time and a lower loss than: {told}."
    for condition in outcome.conditions:
        arms = [cell for cell in outcome.arms(condition) if cell.arm.finished]
        if not arms:
            continue
        best = min(arms, key=lambda cell: float(np.mean(cell.arm.losses)))
        least = float(np.mean(best.arm.losses))
        near = [c for c in arms if float(np.mean(c.arm.losses)) <= least + GOOD_ENOUGH]
        small = min(near, key=lambda cell: cell.arm.finished[0].parameters)
        where = f" at {condition}" if condition else ""
        yield (
            f"Lowest loss{where}: {best.arm.name} ({least:.3f}). Best trade by the criterion "
            f'"smallest within {GOOD_ENOUGH} nats of the lowest": {small.arm.name} '
            f"({small.arm.finished[0].parameters:,} parameters, {float(np.mean(small.arm.losses)):.3f})."
        )


def _of_length(outcome: Outcome) -> Iterable[str]:
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
            e[-1]["val_loss"] - e[-1]["train_loss"]
            for r in cell.arm.finished
            if (e := r.evaluations)
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
            f"{run.summary['epochs']:.2f} epochs were seen; validation minus train loss at the end "
            f"is {float(np.mean(gaps)):+.3f}{_span(gaps, '+.3f')} nats."
        )


def _of_learning_rates(outcome: Outcome) -> Iterable[str]:
    """Where the optimum of the peak learning rate lies, among arms that differ in it alone."""
    for condition in outcome.conditions:
        base = outcome.baseline_of(condition).config
        grid = [
            cell
            for cell in outcome.arms(condition)
            if cell.config.schedule == base.schedule
            and cell.config.warmup_iters == base.warmup_iters
            and _ended(cell)
        ]
        if len({cell.config.learning_rate for cell in grid}) >= 3:
            where = under("", condition)
            yield from _of_grid(grid, where)


def _of_precision(outcome: Outcome) -> Iterable[str]:
    """The arms in order of harm, the most low precision that is as good as the baseline, and where
    quantisation errs most."""
    cells = {(cell.condition, cell.arm.name): cell for cell in outcome.cells}
    for condition in outcome.conditions:
        known = [
            (c, c.recipes)
            for c in outcome.comparisons
            if c.condition == condition and c.recipes and not c.confounds
        ]
        if not known:
            continue
        known.sort(key=lambda entry: -entry[1].estimate)
        told = "; ".join(f"{c.arm} {nats(r.estimate)} ({c.verdict})" for c, r in known)
        yield f"In order of harm{under('', condition)}, nats against {outcome.baseline}: {told}."
        margin = known[0][0].margin
        if margin is None:
            continue
        shares = [
            (low_precision_share(cells[condition, c.arm]) or 0.0, c.arm)
            for c, _ in known
            if c.verdict == EQUIVALENT
        ]
        if shares:
            share, arm = max(shares)
            yield (
                f"Of the arms that are equivalent within {margin:g} nats{under('', condition)}, {arm} has "
                f"the most matrix multiplication in low precision: {share:.0%}."
            )
        else:
            yield f"No arm is shown to be equivalent within {margin:g} nats{under('', condition)}."
    bounds = [
        f"{cell.arm.name} {most:.2f}x"
        for cell in outcome.arms(outcome.conditions[0])
        if (most := _largest_gain(cell)) is not None
    ]
    if bounds:
        yield (
            f"Speed was not measured on hardware. The most that the recipes could bring the record's model "
            f"on an {PLANNED_GPU.name} with compiled code is predicted (`storylab plan`): "
            f"{', '.join(bounds)}."
        )
    for cell in outcome.cells:
        pairs = [
            (own["loss"], run.loss)
            for run in cell.arm.finished
            if (own := run.summary.get("validation_own_precision"))
        ]
        if pairs:
            change = float(np.mean([own - wide for own, wide in pairs]))
            yield f"{cell.name}: evaluated in its own precision the loss is {change:+.4f} nats."
    rows = quantization_rows(outcome)
    if rows:
        for name, text in (("error", "errs most"), ("underflow", "loses most values to zero")):
            worst = max(rows, key=lambda row: row[name] or 0.0)
            yield (
                f"Quantisation {text} in {under(worst['arm'], worst['condition'])}: {worst['tensor']}, "
                f"block {worst['block']}, iteration {worst['iterations']} ({worst[name]:.2%})."
            )


def _largest_gain(cell: CellResult) -> float | None:
    """By how much an emulated arm's recipe could speed up the record's model at most."""
    recipe = find_recipe(cell.config.dtype, cell.config.recipe)
    emulated = any(run.summary.get("emulated") for run in cell.arm.finished)
    if recipe is None or not emulated or not can_run(PLANNED_GPU, recipe):
        return None
    software = SOFTWARE["compiled"]
    return gains(TrainConfig(), GPT2_VOCAB_SIZE, PLANNED_GPU, software, recipe)[1]


def _ended(cell: CellResult) -> dict[tuple[int, int], float]:
    """Losses by seed of the runs that came to an end; infinite for one that diverged."""
    return {run.seeds: run.loss for run in cell.arm.runs if run.state in ENDED}


def _of_grid(grid: Sequence[CellResult], where: str) -> Iterable[str]:
    seeds = sorted(set.intersection(*(set(_ended(cell)) for cell in grid)))
    if not seeds:
        return
    rates = [cell.config.learning_rate for cell in grid]
    by_seed = [[_ended(cell)[seed] for cell in grid] for seed in seeds]
    losses = [float(np.mean(column)) for column in zip(*by_seed, strict=True)]
    finite = [rate for rate, loss in zip(rates, losses, strict=True) if math.isfinite(loss)]
    if not finite:
        yield f"Every peak tried diverged{where}."
        return
    best = int(np.argmin(losses))
    text = (
        f"Of the peaks tried{where}, {rates[best]:g} has the lowest loss ({losses[best]:.3f}, mean of "
        f"{len(seeds)} seeds)"
    )
    optima = [parabola_minimum(rates, of_seed) for of_seed in by_seed]
    found = [math.log(optimum) for optimum in optima if optimum]
    if len(found) == len(optima):
        interval = mean_interval(found)
        span = ""
        if interval:
            span = f" (95 % CI {math.exp(interval.low):.2g} to {math.exp(interval.high):.2g})"
        text += (
            "; a parabola through each seed's best and its neighbours puts the optimum at "
            f"{math.exp(float(np.mean(found))):.2g}{span}"
        )
    else:
        text += (
            "; it is at an end of the grid or beside a diverged run, so the optimum may lie beyond"
        )
    yield text + "."
    gone = [rate for rate, loss in zip(rates, losses, strict=True) if not math.isfinite(loss)]
    if gone:
        yield (
            f"Diverged{where} at a peak of {min(gone):g}; the highest that trained to its end is "
            f"{max(finite):g}."
        )
    else:
        yield f"No peak up to {max(rates):g} made the loss non-finite{where}."


def _span(values: Sequence[float], form: str) -> str:
    interval = mean_interval(values)
    if interval is None:
        return ""
    return f" (95 % CI {format(interval.low, form)} to {format(interval.high, form)})"


_BY_FACTOR: dict[str, Callable[[Outcome], Iterable[str]]] = {
    "attention": _of_windows,
    "size": _of_sizes,
    "length": _of_length,
    "learning_rate": _of_learning_rates,
    "precision": _of_precision,
}
