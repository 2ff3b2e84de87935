"""A comparison in words: one line, and lines with the details."""

from __future__ import annotations

import math

from storylab.experiments.comparison import (
    CANT_TELL,
    CONFOUNDED,
    DIVERGED,
    EQUIVALENT,
    NO_DIFFERENCE,
    Comparison,
    Ratio,
)
from storylab.experiments.factors import under
from storylab.experiments.statistics import Interval


def nats(value: float) -> str:
    """A signed difference in nats, with as many digits as the noise between seeds allows."""
    return f"{value:+.4f}" if abs(value) < 0.01 else f"{value:+.3f}"


def interval_text(interval: Interval) -> str:
    """``+0.012 nats (95 % CI +0.008 to +0.016``, without the closing parenthesis; the caller
    appends to it."""
    digits = 4 if max(abs(interval.low), abs(interval.high)) < 0.1 else 3
    low, high = (f"{v:+.{digits}f}" for v in (interval.low, interval.high))
    return f"{interval.estimate:+.{digits}f} nats (95 % CI {low} to {high}"


def verdict_line(c: Comparison) -> str:
    """The comparison in one short line."""
    title = under(f"{c.arm} vs {c.baseline}", c.condition)
    if c.verdict == DIVERGED:
        return f"{title}: {DIVERGED}, so worse: {'; '.join(c.failures)}"
    if not c.pairs:
        why = "; ".join(c.failures) or "there are no finished runs of both"
        return f"{title}: {CANT_TELL}: {why}"
    if c.confounds:
        return f"{title}: {CONFOUNDED}, no winner is given: {'; '.join(c.confounds)}"
    parts = [f"{title}: {_loss_part(c)}", *_speed_parts(c)]
    return "; ".join(parts)


def _loss_part(c: Comparison) -> str:
    stories = f"{c.stories.n:,} stories" if c.stories else "no stories"
    if c.recipes is None:
        difference = f"val loss {nats(c.stories.estimate)} nats" if c.stories else "no loss"
        if not c.paired:
            return (
                f"{difference} between runs of different seeds, other weights and data order "
                f"({stories}): {CANT_TELL}; train both with the same seeds"
            )
        if c.noise is not None:
            return (
                f"{difference} ({stories}): {CANT_TELL}, as an arm has one run and no common seed"
            )
        needed = c.seeds_needed
        more = f"; about {needed} paired seeds would decide" if needed else ""
        return (
            f"{difference} with one seed ({stories}): {CANT_TELL} whether the recipe or the seed did "
            f"it, as no noise floor is known for this recipe (train the baseline with other seeds "
            f"too, or see `storylab noise`){more}"
        )
    if c.from_noise:
        assert c.noise is not None
        kind = "1 pair" if c.paired else "1 unpaired pair"
        base = f"{kind} and the noise of {c.noise.seeds} seeds"
    else:
        base = f"{c.pairs} paired seeds" if c.paired else f"{c.pairs} unpaired seeds"
    text = f"val loss {interval_text(c.recipes)}; {base}, {stories}): {c.verdict}"
    if c.baseline_diverged:
        text += f", as {c.baseline_diverged} runs of the baseline diverged"
    if c.verdict == EQUIVALENT:
        text += f" within {c.margin:g} nats"
    elif c.verdict == NO_DIFFERENCE or (c.verdict == CANT_TELL and not c.baseline_diverged):
        text += _what_would_decide(c)
    elif c.noise and c.noise.standard_deviation:
        times = abs(c.recipes.estimate) / c.noise.standard_deviation
        text += f", {times:.0f}x seed noise" if times >= 10 else f", {times:.2g}x seed noise"
    return text


def _what_would_decide(c: Comparison) -> str:
    assert c.recipes is not None
    facts = []
    if c.verdict == CANT_TELL:
        facts.append(f"not sure enough among {c.family} comparisons")
    elif c.detectable is not None and math.isfinite(c.detectable):
        facts.append(f"could have seen {c.detectable:.2g}")
    if c.seeds_needed:
        facts.append(f"{c.seeds_needed} seeds would decide a difference of this size")
    return f" ({', '.join(facts)})" if facts else ""


def _speed_parts(c: Comparison) -> list[str]:
    if c.speed_confounds:
        return [f"speed is not comparable ({'; '.join(c.speed_confounds)})"]
    parts = []
    if c.speed:
        parts.append(ratio_text(c.speed, "faster", "slower", "speed", c.paired))
    if c.equal_time and c.speed and c.verdict != CANT_TELL and abs(math.log(c.speed.value)) > 0.02:
        difference = c.equal_time.difference
        word = "better" if difference < 0 else "worse"
        low, high = c.equal_time.low, c.equal_time.high
        doubt = ""
        if low is None or high is None:
            doubt = " (one pair)"
        elif low <= 0 <= high:
            doubt = " (interval spans 0)"
        parts.append(f"at equal time: {word} by {abs(difference):.3f}{doubt}")
    return parts


def ratio_text(ratio: Ratio, more: str, less: str, what: str, paired: bool = True) -> str:
    """``1.31x faster (1.28 to 1.34)``; the same only if the whole interval is within 2 % of 1."""
    low, high = ratio.low, ratio.high
    single = "one pair" if paired else "one run each"
    if low is not None and high is not None and low >= 0.98 and high <= 1.02:
        return f"same {what} ({low:.2f}x to {high:.2f}x)"
    if low is None and abs(ratio.value - 1) < 0.005:
        return f"same {what} ({single})"
    unclear = ""
    if low is not None and high is not None and low <= 1 <= high:
        unclear = ": can't tell"
    word, value = (more, ratio.value) if ratio.value >= 1 else (less, 1 / ratio.value)
    if low is None or high is None:
        return f"{value:.2f}x {word} ({single})"
    if ratio.value < 1:
        low, high = 1 / high, 1 / low
    return f"{value:.2f}x {word} ({low:.2f} to {high:.2f}{unclear})"


def detail_lines(c: Comparison) -> list[str]:
    """The facts behind the verdict, one a line."""
    lines = []
    if c.recipes is not None and not c.confounds:
        adjusted = f", {c.adjusted_p:.2g} corrected for {c.family}" if c.family > 1 else ""
        lines.append(
            f"recipes: {interval_text(c.recipes)}), p {c.recipes.p:.2g}{adjusted}"
            + (
                f"; equivalence within {c.margin:g}: p {c.adjusted_equivalence_p:.2g}"
                if c.margin
                else ""
            )
        )
    if c.stories is not None:
        lines.append(
            f"these models on stories like these: {interval_text(c.stories)}; "
            f"{c.stories.n:,} stories, paired), p {c.stories.p:.2g}"
        )
    if c.noise is not None:
        lines.append(
            f"seed noise of {c.baseline}: standard deviation {c.noise.standard_deviation:.4f} nats "
            f"over {c.noise.seeds} seeds"
        )
    if not c.speed_confounds:
        for ratio, what, more, less in (
            (c.speed, "speed", "faster", "slower"),
            (c.memory, "memory of training", "more memory", "less memory"),
            (c.energy, "energy", "more energy", "less energy"),
        ):
            lines.append(
                f"{what}: {ratio_text(ratio, more, less, what, c.paired)}"
                if ratio
                else f"{what}: not measured"
            )
    if c.equal_time is not None and not c.confounds:
        e = c.equal_time
        spread = f" (95 % CI {e.low:+.3f} to {e.high:+.3f})" if e.low is not None else ""
        lines.append(
            f"at equal training time: {e.difference:+.3f} nats{spread}, read off the curves of the "
            f"estimates during training; "
            f"{e.slower} had done {e.progress:.0%} of its schedule by then"
        )
    lines += [f"differs: {text}" for text in (*c.confounds, *c.speed_confounds)]
    lines += [f"not finished: {text}" for text in c.failures]
    return [*lines, *c.notes]
