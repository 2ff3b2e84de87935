"""The effects of a factorial experiment in words: before any run, and with their verdicts."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from storylab.experiments.comparison import (
    CONFOUNDED,
    DIVERGED,
    EQUIVALENT,
    UNDECIDED,
)
from storylab.experiments.effects import (
    INTERACT,
    INTERACT_WITHIN,
    NO_INTERACTION,
    EffectResult,
    SimpleEffect,
    effect_title,
)
from storylab.experiments.factorial import Factorial
from storylab.experiments.outcome import Outcome
from storylab.experiments.statistics import ALPHA
from storylab.experiments.verdicts import (
    evidence_text,
    interval_text,
    judgement_text,
    next_look_text,
    p_text,
    ratio_text,
    size_text,
    verdict_line,
)


def design_lines(factorial: Factorial, seeds: int, conditions: int = 1) -> Iterator[str]:
    """The effects that an experiment will estimate, and the runs that it saves.

    Args:
        factorial: the design.
        seeds: number of seeds.
        conditions: number of conditions, under each of which all cells are trained.
    """
    count, cells = len(factorial.factors), len(factorial.cells)
    yield (
        f"Factorial: {count} factors of two levels, {factorial.size_text}; every seed is a block of "
        f"{cells} runs"
    )
    mains = [factorial.effect_name(e.factors) for e in factorial.effects if len(e.factors) == 1]
    pairs = [factorial.effect_name(e.factors) for e in factorial.effects if len(e.factors) > 1]
    yield f"  main effects: {', '.join(mains)}"
    yield f"  interactions: {', '.join(pairs) or 'none can be separated from main effects'}"
    yield from (f"  {line}" for line in alias_lines(factorial))
    runs = cells * seeds * conditions
    many = (count + 1) / 2
    yield (
        f"  one factor at a time would need {many:g} times as many runs for main effects as precise: "
        f"{round(many * runs):,} instead of {runs:,}, and would show no interaction"
    )


def alias_lines(factorial: Factorial) -> Iterator[str]:
    """The effects of a fraction that share an estimate, a line each."""
    for effect in factorial.effects:
        if effect.aliases:
            others = " or ".join(factorial.effect_name(other) for other in effect.aliases)
            name = factorial.effect_name(effect.factors)
            yield f"the effect of {name} cannot be separated from {others}"


def effect_line(e: EffectResult) -> str:
    """The effect in one short line, with the interval that belongs to its verdict."""
    title = effect_title(e)
    if e.verdict == CONFOUNDED:
        return f"{title}: {CONFOUNDED}, no effect is given: {'; '.join(e.confounds)}"
    text = f"{title}: {_loss_text(e)}"
    if e.speed is not None:
        text += f"; {ratio_text(e.speed, 'faster', 'slower', 'speed')}"
    return ". ".join([text, *_closing(e)])


def _loss_text(e: EffectResult) -> str:
    if e.verdict == DIVERGED:
        cells = f"{len(e.diverged)} cells" if len(e.diverged) > 1 else e.diverged[0]
        return f"{DIVERGED}: runs of {cells} did, so no loss is compared"
    j = e.judgement
    if j.interval is None or j.ends is None:
        waits = f"; the first planned look is at {j.next_look} seeds" if j.next_look else ""
        return f"{UNDECIDED}: too few seeds have ended in every cell{waits}"
    return (
        _interaction_text(e) if e.is_interaction else judgement_text(j, e.word, e.ends, "effects")
    )


def _interaction_text(e: EffectResult) -> str:
    j, ends = e.judgement, e.ends
    together = f"; holds for all {j.family} effects together" if j.family > 1 else ""
    if ends is None:
        # The sign is settled before the interval for all effects leaves zero.
        return f"{e.verdict}; by how much is not settled{together.replace(';', ',')}"
    low, high = (f"{end:+.4f}" if abs(end) < 0.01 else f"{end:+.3f}" for end in ends)
    span = f"{low} to {high}"
    if e.word == UNDECIDED:
        return f"{UNDECIDED}: {span} nats{together.replace('; ', ' (')}{')' if together else ''}"
    if e.word == EQUIVALENT:
        return f"{NO_INTERACTION} of {j.margin:g} nats ({span} nats{together})"
    near, far = sorted(map(abs, ends))
    size = size_text(j.interval.estimate) if j.interval else ""
    sign = "better" if ends[1] < 0 else "worse"
    within = f", which is less than the margin of {j.margin:g} nats" if j.equivalent else ""
    return (
        f"{INTERACT} by {size} nats ({size_text(near)} to {size_text(far)}{together}){within}: both "
        f"together are {sign} than the sum of each alone"
    )


def _closing(e: EffectResult) -> Iterator[str]:
    j = e.judgement
    if e.verdict in (INTERACT, INTERACT_WITHIN):
        yield "; ".join(simple_lines(e))
    if e.interacts_with:
        yield f"A mean over the levels of {' and '.join(e.interacts_with)}, which change it"
    if e.aliases:
        yield f"It cannot be separated from {' or '.join(e.aliases)}"
    if j.interval is not None and e.verdict != DIVERGED:
        yield f"{j.interval.n} seeds{': preliminary' if e.preliminary else ''}"
    if e.verdict != DIVERGED:
        yield from next_look_text(j)
    if j.e is not None:
        yield evidence_text(j)
    yield from e.recovered
    if e.exploratory:
        yield f"Exploratory: {'; '.join(e.exploratory)}"


def simple_lines(e: EffectResult) -> list[str]:
    """The effect of each factor of an interaction at each level of the other, in signed nats."""
    found: dict[str, list[str]] = {}
    for simple in e.simple:
        found.setdefault(simple.change, []).append(_simple_text(simple))
    return [f"{change}: {', '.join(texts)}" for change, texts in found.items()]


def _simple_text(simple: SimpleEffect) -> str:
    low, high = simple.interval.ends(ALPHA)
    return f"{simple.interval.estimate:+.3f} ({low:+.3f} to {high:+.3f}) with {simple.held}"


def effect_details(e: EffectResult) -> list[str]:
    """The facts behind an effect's verdict, one a line."""
    j, lines = e.judgement, []
    if j.interval is not None and not e.confounds and not e.diverged:
        family = ""
        if j.alpha < ALPHA:
            low, high = j.interval.ends(j.alpha)
            family = f"; for {j.family} effects together {low:+.4f} to {high:+.4f}"
        lines.append(
            f"{interval_text(j.interval)}{family}), {j.variance} variance, {p_text(j.interval.p)}"
        )
    if e.is_interaction and e.verdict not in (INTERACT, INTERACT_WITHIN, CONFOUNDED, DIVERGED):
        lines += simple_lines(e)
    lines += [f"diverged: {cell}" for cell in e.diverged]
    return lines + [f"left out, {text}" for text in e.left_out]


def verdict_lines(outcome: Outcome, settled: Collection[tuple[str, str]] = ()) -> list[str]:
    """The verdicts of an experiment, a line each: of its effects, or of its arms.

    Args:
        outcome: the experiment.
        settled: conditions and arms to leave out.
    """
    if outcome.effects:
        done = {condition for condition, _ in settled}
        return [effect_line(e) for e in outcome.effects if e.condition not in done]
    return [verdict_line(c) for c in outcome.comparisons if (c.condition, c.arm) not in settled]
