"""A comparison in words: one line, and lines with the details."""

from __future__ import annotations

from collections.abc import Iterator

from storylab.experiments import statistics
from storylab.experiments.comparison import (
    BETTER,
    BETTER_WITHIN,
    CONFOUNDED,
    DIVERGED,
    EQUIVALENT,
    NOT_JUDGED,
    UNDECIDED,
    WORSE,
    WORSE_WITHIN,
    Comparison,
    Ratio,
)
from storylab.experiments.factors import qualified_name
from storylab.experiments.family import Judgement
from storylab.experiments.statistics import ALPHA, Interval


def nats(value: float) -> str:
    """A signed difference in nats, with as many digits as the noise between seeds allows."""
    return f"{value:+.4f}" if abs(value) < 0.01 else f"{value:+.3f}"


def interval_text(interval: Interval, alpha: float = ALPHA) -> str:
    """``+0.012 nats (95 % CI +0.008 to +0.016``, without the closing parenthesis; the caller
    appends to it."""
    ends = interval.ends(alpha)
    digits = 4 if max(map(abs, ends)) < 0.1 else 3
    low, high = (f"{v:+.{digits}f}" for v in ends)
    level = f"{100 * (1 - alpha):.4g} % CI"
    return f"{interval.estimate:+.{digits}f} nats ({level} {low} to {high}"


def p_text(p: float) -> str:
    """``p 0.012``; a p-value that no double can hold is given as a bound."""
    return f"p {p:.2g}" if p > 0 else "p < 1e-300"


def verdict_line(c: Comparison) -> str:
    """The comparison in one short line, with the interval that belongs to its verdict."""
    title = qualified_name(f"{c.arm} vs {c.baseline}", c.condition)
    if c.verdict == CONFOUNDED:
        return f"{title}: {CONFOUNDED}, no winner is given: {'; '.join(c.confounds)}"
    text = "; ".join([f"{title}: {loss_text(c)}", *_speed_parts(c)])
    return ". ".join([text, *_closing(c)])


def loss_text(c: Comparison) -> str:
    """The verdict with its interval: the claim of the line."""
    if c.verdict == DIVERGED:
        (ours, theirs), (n, m) = c.diverged, c.ended
        return f"{DIVERGED} in {ours} of {n} seeds ({c.baseline} in {theirs} of {m}): no loss is compared"
    j, r = c.judgement, c.recipes
    if r is None or j.ends is None:
        return f"{UNDECIDED}: {_why_nothing(c)}"
    if c.verdict == NOT_JUDGED:
        return f"{interval_text(r)}); {NOT_JUDGED}"
    return judgement_text(j, c.verdict, c.ends)


def judgement_text(
    j: Judgement, verdict: str, ends: tuple[float, float] | None, kind: str = "arms"
) -> str:
    """A verdict of a measured difference with its interval.

    Args:
        j: the judgement, with an interval.
        verdict: one of the words of a comparison that compares losses.
        ends: of the interval that belongs to it.
        kind: the things that are judged together.
    """
    if j.ends is None or j.interval is None:
        raise ValueError("a judgement without an interval has no text")
    together = f"holds for all {j.family} {kind} together" if j.family > 1 else ""
    margin = f"the margin of {j.margin:g} nats" if j.margin else ""
    if verdict in (EQUIVALENT, UNDECIDED) and ends:
        within = f", within {margin}" if verdict == EQUIVALENT else ""
        so_far = f"{span_text(j.interval.estimate)} so far, from " if verdict == UNDECIDED else ""
        more = f" ({together})" if together else ""
        return f"{verdict}: {so_far}{span_text(*ends)}{within}{more}"
    word = BETTER if verdict in (BETTER, BETTER_WITHIN) else WORSE
    if ends is None:
        # Holm's method can settle the sign before the interval for all arms leaves zero.
        most = -j.ends[0] if word == BETTER else j.ends[1]
        text = f"{word}; by how much is not settled: up to {size_text(most)} nats"
        text += f" ({together})" if together else ""
    else:
        near, far = sorted(map(abs, ends))
        more = f"; {together}" if together else ""
        span = f"{size_text(near)} to {size_text(far)}"
        text = f"{word} by {size_text(j.interval.estimate)} nats ({span}{more})"
    if verdict in (BETTER_WITHIN, WORSE_WITHIN):
        text += f", which is less than {margin}"
    return text


def size_text(value: float) -> str:
    """The size of a difference in nats, without its sign."""
    return f"{abs(value):.4f}" if abs(value) < 0.01 else f"{abs(value):.3f}"


def span_text(*ends: float) -> str:
    """``0.012 better to 0.024 worse`` for -0.012 to +0.024; ``0.010 to 0.024 worse`` for one sign."""
    words = ["better" if value < 0 else "worse" for value in ends]
    if len(set(words)) == 1:
        near_first = sorted(ends, key=abs)
        return f"{' to '.join(map(size_text, near_first))} {words[0]}"
    return " to ".join(f"{size_text(v)} {word}" for v, word in zip(ends, words, strict=True))


def _why_nothing(c: Comparison) -> str:
    if not c.pairs:
        return "; ".join(c.failures) or "there are no finished runs of both"
    if c.judgement.next_look is not None:
        seeds = f"{c.pairs} seed{'s' * (c.pairs != 1)} of both"
        return f"{seeds} ended, the first planned look is at {c.judgement.next_look}"
    difference = f"val loss {nats(c.stories.estimate)} nats" if c.stories else "no loss"
    if not c.paired:
        return (
            f"{difference} between runs of different seeds, other weights and data order; train both "
            "with the same seeds"
        )
    return (
        f"{difference} with one seed; the recipe or the seed may have done it, as no noise floor is known "
        "for this recipe (train the baseline with other seeds too, or see `storylab noise`)"
    )


def _closing(c: Comparison) -> Iterator[str]:
    """The seeds that the verdict rests on, and the next look."""
    j = c.judgement
    if c.recipes is not None and c.verdict != DIVERGED:
        if c.recipes.n == 1:
            seeds = c.noise.seeds if c.noise else 0
            yield f"One run, and the noise of {seeds} seeds: preliminary"
        elif not c.paired:
            yield f"{c.recipes.n} unpaired seeds{': preliminary' if c.preliminary else ''}"
        else:
            yield f"{c.recipes.n} seeds{': preliminary' if c.preliminary else ''}"
    if c.verdict != DIVERGED:
        yield from next_look_text(j)
    if j.e is not None:
        yield evidence_text(j)
    yield from c.recovered
    if c.exploratory:
        yield f"Exploratory: {'; '.join(c.exploratory)}"


def next_look_text(j: Judgement) -> Iterator[str]:
    """The next planned look of a judgement that an earlier one has left open."""
    if j.next_look is not None and j.look is not None:
        yield f"Next planned look: {j.next_look} seeds"


def evidence_text(j: Judgement) -> str:
    """The always-valid evidence of seeds that no look has planned."""
    seeds = (j.interval.n if j.interval else 0) + j.extra_seeds
    return (
        f"With all {seeds} seeds, unplanned: "
        f"e-value {j.e:.3g} ({j.family / ALPHA:.0f} or more would show a difference)"
    )


def _speed_parts(c: Comparison) -> list[str]:
    if not c.pairs:
        return []
    if c.speed_confounds:
        return [f"speed is not comparable ({'; '.join(c.speed_confounds)})"]
    parts = []
    if c.speed:
        parts.append(ratio_text(c.speed, "faster", "slower", "speed", c.paired))
    e = c.equal_time
    if e and e.interval and c.verdict != DIVERGED:
        # Named in the line at the level of the verdict alone: it is one more claim about the same arms.
        low, high = e.interval.ends(c.judgement.alpha)
        if not low <= 0 <= high:
            parts.append(
                f"at equal time {span_text(low, high)} ({e.slower} was at {e.progress:.0%} of its "
                "schedule)"
            )
    return parts


def ratio_text(ratio: Ratio, more: str, less: str, what: str, paired: bool = True) -> str:
    """``1.31x faster (1.28 to 1.34)``; the same only if the whole interval is within 2 % of 1."""
    low, high = ratio.low, ratio.high
    if low is None or high is None:
        some = f"{'one' if ratio.pairs == 1 else ratio.pairs} "
        some += f"pair{'s' * (ratio.pairs > 1)}" if paired else f"run{'s' * (ratio.pairs > 1)} each"
        if abs(ratio.value - 1) < 0.005:
            return f"same {what} ({some})"
        word, value = (more, ratio.value) if ratio.value >= 1 else (less, 1 / ratio.value)
        return f"{value:.2f}x {word} ({some})"
    if low >= 0.98 and high <= 1.02:
        return f"same {what} ({low:.2f}x to {high:.2f}x)"
    unclear = ": can't tell" if low <= 1 <= high else ""
    word, value = (more, ratio.value) if ratio.value >= 1 else (less, 1 / ratio.value)
    if ratio.value < 1:
        low, high = 1 / high, 1 / low
    return f"{value:.2f}x {word} ({low:.2f} to {high:.2f}{unclear})"


def detail_lines(c: Comparison) -> list[str]:
    """The facts behind the verdict, one a line."""
    lines = [*_loss_details(c), *_cost_details(c), *_curve_details(c)]
    lines += [f"differs: {text}" for text in dict.fromkeys((*c.confounds, *c.speed_confounds))]
    lines += [f"not finished: {text}" for text in c.failures]
    return [*lines, *c.notes]


def _loss_details(c: Comparison) -> Iterator[str]:
    j = c.judgement
    if c.recipes is not None and not c.confounds:
        source = f"{j.variance} variance" if c.paired and c.recipes.n > 1 else "its own variance"
        arms = "at this look" if j.family == 1 else f"for {j.family} arms together"
        of_all = f"; {arms}{_ends_text(j.alpha, c.recipes)}" * (j.alpha < ALPHA)
        yield f"recipes: {interval_text(c.recipes)}{of_all}), {source}, {p_text(c.recipes.p)}"
    if c.stories is not None:
        yield (
            f"these models on stories like these: {interval_text(c.stories)}; "
            f"{c.stories.n:,} stories, paired), {p_text(c.stories.p)}"
        )
    if c.over_both is not None and not c.confounds:
        yield f"new seeds and new stories together: {interval_text(c.over_both)})"
    if c.noise is not None:
        yield (
            f"seed noise of {c.baseline}: standard deviation {c.noise.standard_deviation:.4f} nats "
            f"over {c.noise.seeds} seeds"
        )
    if c.correlation is not None:
        yield (
            f"correlation of the arms over {c.pairs} seeds: {c.correlation:.2f}"
            + ("; pairing by seed removes that part of the noise" if c.correlation > 0 else "")
        )
    if any(c.diverged):
        yield from _divergence(c)


def _ends_text(alpha: float, interval: Interval) -> str:
    low, high = interval.ends(alpha)
    return f" {low:+.4f} to {high:+.4f} ({100 * (1 - alpha):.5g} %)"


def _divergence(c: Comparison) -> Iterator[str]:
    p = statistics.shares_p(c.diverged, c.ended)
    shown = "diverge with different chances" if p < ALPHA else "are not shown to differ in that"
    for name, count, n in zip((c.arm, c.baseline), c.diverged, c.ended, strict=True):
        if n:
            low, high = statistics.share_interval(count, n)
            yield f"{name} diverged in {count} of {n} seeds (95 % CI {low:.0%} to {high:.0%})"
    yield f"the two {shown} (Fisher's exact test, {p_text(p)})"


def _cost_details(c: Comparison) -> Iterator[str]:
    if c.speed_confounds:
        return
    for ratio, what, more, less in (
        (c.speed, "speed", "faster", "slower"),
        (c.memory, "memory of training", "more memory", "less memory"),
        (c.energy, "energy", "more energy", "less energy"),
    ):
        text = ratio_text(ratio, more, less, what, c.paired) if ratio else "not measured"
        yield f"{what}: {text}"


def _curve_details(c: Comparison) -> Iterator[str]:
    if c.confounds:
        return
    if c.reach is not None:
        costs = [("tokens", c.reach.tokens), ("FLOPs", c.reach.flops)]
        costs += [("seconds", c.reach.seconds)] if c.reach.seconds else []
        told = ", ".join(ratio_text(r, f"fewer {k}", f"more {k}", k, c.paired) for k, r in costs)
        yield f"for an equal loss, that at which the worse of the two ends: {told}"
    if c.equal_time is not None:
        e = c.equal_time
        spread = f" (95 % CI {e.interval.low:+.3f} to {e.interval.high:+.3f})" if e.interval else ""
        yield (
            f"at equal training time: {e.difference:+.3f} nats{spread}, read off the curves of the "
            f"estimates during training; "
            f"{e.slower} had done {e.progress:.0%} of its schedule by then"
        )
