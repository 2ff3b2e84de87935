"""The effects of a factorial experiment in the report: their table, their headline, and all facts."""

from __future__ import annotations

from storylab.experiments.comparison import UNDECIDED
from storylab.experiments.effect_words import effect_details, effect_line, simple_lines
from storylab.experiments.effects import EffectResult, effect_title
from storylab.experiments.outcome import Outcome
from storylab.experiments.verdicts import detail_lines, nats, ratio_text, verdict_line


def factor_text(outcome: Outcome) -> str:
    """The factor of an experiment, or those of a factorial one with their levels."""
    design = outcome.factorial
    return design.text if design else outcome.factor or "none"


def effects_headline(outcome: Outcome) -> str:
    """The verdicts of a factorial experiment in one sentence."""
    kinds: dict[str, list[str]] = {}
    for e in outcome.effects:
        shown = e.ends is not None and e.word != UNDECIDED and e.judgement.interval
        size = f" ({nats(e.judgement.interval.estimate)})" if shown and e.judgement.interval else ""
        kinds.setdefault(e.verdict, []).append(f"{effect_title(e)}{size}")
    told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
    return f"Effects, in nats: {told}."


def effect_table(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Headings and a row for every effect; no rows for other experiments."""
    headings = [
        "effect",
        "difference (interval of the verdict)",
        "at the levels of the other factor",
        "speed",
        "shares its estimate with",
        "seeds",
        "verdict",
    ]
    return headings, [_row(e) for e in outcome.effects]


def _row(e: EffectResult) -> list[str]:
    interval, ends = e.judgement.interval, e.ends
    difference = ""
    if interval is not None and ends is not None:
        difference = f"{interval.estimate:+.4f} ({ends[0]:+.4f} to {ends[1]:+.4f})"
    return [
        effect_title(e),
        difference,
        "; ".join(simple_lines(e)),
        ratio_text(e.speed, "faster", "slower", "speed") if e.speed else "",
        ", ".join(e.aliases),
        str(interval.n) if interval else "0",
        e.verdict,
    ]


def verdicts_in_full(outcome: Outcome) -> list[list[str]]:
    """Every effect and every comparison of arms: its line, and the facts behind it."""
    effects = [[effect_line(e), *effect_details(e)] for e in outcome.effects]
    return [*effects, *([verdict_line(c), *detail_lines(c)] for c in outcome.comparisons)]
