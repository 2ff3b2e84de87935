"""Verdicts and their details in words, of numbers that are made up and computed by hand.

With 2 degrees of freedom a 95 % interval reaches 4.303 standard errors, a 98.75 % one 8.860 (tables of
Student's t).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import intervals_cover
from storylab.experiments.comparison import Comparison, EqualTime, Noise, Ratio, Reach
from storylab.experiments.family import Judgement
from storylab.experiments.statistics import Interval
from storylab.experiments.verdicts import (
    detail_lines,
    evidence_text,
    interval_text,
    nats,
    p_text,
    ratio_text,
    size_text,
    span_text,
    verdict_line,
)

CLEAR = Interval(-0.1, 0.01, 2, 3)
WIDE = Interval(-0.1, 0.05, 2, 3)
STORIES = Interval(-0.09, 0.01, 2, 1200)


def comparison(judgement: Judgement, **changes: Any) -> Comparison:
    made_up = intervals_cover.comparison(judgement)
    named = {"arm": "arm", "baseline": "base", "condition": "", "recovered": ()}
    return dataclasses.replace(made_up, **(named | changes))


@pytest.mark.parametrize(
    ("judgement", "line"),
    [
        (Judgement(CLEAR, different=True), "better by 0.100 nats (0.057 to 0.143)"),
        (
            Judgement(CLEAR.scaled(-1), different=True, family=4, alpha=0.0125),
            "worse by 0.100 nats (0.011 to 0.189; holds for all 4 arms together)",
        ),
        (
            Judgement(CLEAR, different=True, equivalent=True, margin=0.2),
            "better by 0.100 nats (0.057 to 0.143), which is less than the margin of 0.2 nats",
        ),
        (
            Judgement(WIDE, different=True, family=4),
            "better; by how much is not settled: up to 0.315 nats (holds for all 4 arms together)",
        ),
        (
            Judgement(WIDE.scaled(-1), different=True),
            "worse; by how much is not settled: up to 0.315 nats",
        ),
        (Judgement(WIDE), "undecided: 0.100 better so far, from 0.315 better to 0.115 worse"),
        (
            Judgement(WIDE.scaled(0.1), equivalent=True, margin=0.05, family=2, alpha=0.025),
            # At twice the level: 4.303 standard errors.
            "equivalent: 0.032 better to 0.012 worse, within the margin of 0.05 nats (holds for all "
            "2 arms together)",
        ),
    ],
)
def test_a_verdict_has_the_interval_that_belongs_to_it(judgement: Judgement, line: str) -> None:
    assert verdict_line(comparison(judgement)) == f"arm vs base: {line}. 3 seeds: preliminary"


def test_a_verdict_of_enough_seeds_is_not_preliminary() -> None:
    five = Judgement(dataclasses.replace(CLEAR, n=5), different=True, look=5, next_look=None)
    assert verdict_line(comparison(five)).endswith(". 5 seeds")
    unpaired = comparison(five, paired=False, condition="512 tokens")
    assert verdict_line(unpaired).startswith("arm vs base @ 512 tokens: better")
    assert verdict_line(unpaired).endswith(". 5 unpaired seeds")
    open_still = Judgement(WIDE, look=3, next_look=5)
    assert verdict_line(comparison(open_still)).endswith("Next planned look: 5 seeds")
    one = Judgement(dataclasses.replace(WIDE, n=1))
    noise = Noise(3.4, 0.01, 4)
    line = verdict_line(comparison(one, noise=noise))
    assert line.endswith(". One run, and the noise of 4 seeds: preliminary")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"pairs": 1}, "1 seed of both ended, the first planned look is at 3"),
        ({"pairs": 2}, "2 seeds of both ended, the first planned look is at 3"),
        ({"pairs": 0}, "there are no finished runs of both"),
        ({"pairs": 0, "failures": ("arm, seed 1: unfinished",)}, "arm, seed 1: unfinished"),
    ],
)
def test_without_an_interval_the_line_says_why(changes: dict[str, Any], line: str) -> None:
    found = verdict_line(comparison(Judgement(next_look=3), **changes))
    assert found == f"arm vs base: undecided: {line}"


def test_what_diverged_or_is_confounded_has_no_number() -> None:
    lost = comparison(Judgement(CLEAR, different=True), diverged=(2, 0), ended=(3, 4))
    assert verdict_line(lost) == (
        "arm vs base: diverged in 2 of 3 seeds (base in 0 of 4): no loss is compared"
    )
    mixed = comparison(Judgement(CLEAR), confounds=("other data", "other torch"))
    assert verdict_line(mixed) == (
        "arm vs base: confounded, no winner is given: other data; other torch"
    )
    told = Judgement(CLEAR, described=True)
    assert verdict_line(comparison(told)).startswith(
        "arm vs base: -0.100 nats (95 % CI -0.143 to -0.057); not judged by itself"
    )


def test_recoveries_and_exploratory_verdicts_are_told_at_the_end() -> None:
    c = comparison(Judgement(CLEAR, different=True), recovered=("it skipped",))
    c = dataclasses.replace(c, exploratory=("no plan", "changed"))
    assert verdict_line(c).endswith("preliminary. it skipped. Exploratory: no plan; changed")


@pytest.mark.parametrize(
    ("value", "signed", "size"),
    [
        (0.0099, "+0.0099", "0.0099"),
        (0.01, "+0.010", "0.010"),
        (-0.5, "-0.500", "0.500"),
        (-0.002, "-0.0020", "0.0020"),
    ],
)
def test_small_differences_have_four_digits(value: float, signed: str, size: str) -> None:
    assert (nats(value), size_text(value)) == (signed, size)


def test_intervals_name_their_level_and_keep_one_number_of_digits() -> None:
    assert interval_text(CLEAR) == "-0.100 nats (95 % CI -0.143 to -0.057"
    assert interval_text(CLEAR, 0.0125) == "-0.100 nats (98.75 % CI -0.189 to -0.011"
    assert interval_text(WIDE.scaled(0.1)) == "-0.0100 nats (95 % CI -0.0315 to +0.0115"
    assert span_text(-0.024, -0.0105) == "0.011 to 0.024 better"
    assert span_text(0.003, 0.024) == "0.0030 to 0.024 worse"
    assert span_text(-0.012, 0.024) == "0.012 better to 0.024 worse"
    assert (p_text(0.0123), p_text(0.0)) == ("p 0.012", "p < 1e-300")


@pytest.mark.parametrize(
    ("ratio", "paired", "text"),
    [
        (Ratio(1.5, None, None, 1), True, "1.50x faster (one pair)"),
        (Ratio(0.5, None, None, 2), True, "2.00x slower (2 pairs)"),
        (Ratio(1.5, None, None, 1), False, "1.50x faster (one run each)"),
        (Ratio(1.5, None, None, 2), False, "1.50x faster (2 runs each)"),
        (Ratio(1.004, None, None, 1), True, "same speed (one pair)"),
        (Ratio(0.99, None, None, 1), True, "1.01x slower (one pair)"),
        (Ratio(1.3, 1.2, 1.4, 3), True, "1.30x faster (1.20 to 1.40)"),
        (Ratio(0.8, 0.75, 0.85, 3), True, "1.25x slower (1.18 to 1.33)"),
        (Ratio(1.1, 0.9, 1.3, 3), True, "1.10x faster (0.90 to 1.30: can't tell)"),
        (Ratio(0.9, 0.8, 1.25, 3), True, "1.11x slower (0.80 to 1.25: can't tell)"),
        (Ratio(1.0, 0.99, 1.01, 3), True, "same speed (0.99x to 1.01x)"),
        (Ratio(1.01, 0.99, 1.03, 3), True, "1.01x faster (0.99 to 1.03: can't tell)"),
    ],
)
def test_a_ratio_in_words(ratio: Ratio, paired: bool, text: str) -> None:
    assert ratio_text(ratio, "faster", "slower", "speed", paired) == text


def test_unplanned_seeds_are_evidence_with_its_bound() -> None:
    found = evidence_text(Judgement(CLEAR, family=4, extra_seeds=2, e=7.5))
    assert found == (
        "With all 5 seeds, unplanned: e-value 7.5 (80 or more would show a difference)"
    )
    assert "With all 2 seeds" in evidence_text(Judgement(extra_seeds=2, e=1.0))


@pytest.mark.parametrize(
    ("interval", "told"),
    [
        (
            Interval(-0.2, 0.01, 2, 3),
            "; at equal time 0.157 to 0.243 better (arm was at 80% of its",
        ),
        (Interval(0.2, 0.01, 2, 3), "; at equal time 0.157 to 0.243 worse (arm was at 80% of its"),
        (Interval(-0.04, 0.01, 2, 3), None),
        (None, None),
    ],
)
def test_equal_time_is_in_the_line_if_its_interval_says_something(
    interval: Interval | None, told: str | None
) -> None:
    equal_time = EqualTime(-0.2, interval, 0.8, "arm")
    c = comparison(Judgement(CLEAR, different=True), equal_time=equal_time)
    line = verdict_line(c)
    assert told in line if told else "equal time" not in line
    lost = dataclasses.replace(c, diverged=(1, 0), ended=(3, 3))
    assert "equal time" not in verdict_line(lost)
    other = dataclasses.replace(c, speed_confounds=("other CPU",))
    assert "; speed is not comparable (other CPU)" in verdict_line(other)
    assert "equal time" not in verdict_line(other)


def test_the_details_of_a_verdict() -> None:
    ratio = Ratio(1.5, 1.4, 1.6, 3)
    c = comparison(
        Judgement(CLEAR, different=True, family=4, alpha=0.0125, variance="pooled"),
        pairs=3,
        stories=STORIES,
        noise=Noise(3.4, 0.0123, 5),
        correlation=0.88,
        speed=ratio,
        memory=Ratio(0.5, None, None, 1),
        reach=Reach(ratio, None, ratio),
        equal_time=EqualTime(-0.2, CLEAR, 0.8, "arm"),
        failures=("arm, seed 4: unfinished",),
        notes=("a note",),
    )
    assert detail_lines(c) == [
        "recipes: -0.100 nats (95 % CI -0.143 to -0.057; for 4 arms together -0.1886 to -0.0114 "
        "(98.75 %)), pooled variance, p 0.0099",
        "these models on stories like these: -0.090 nats (95 % CI -0.133 to -0.047; 1,200 stories, "
        "paired), p 0.012",
        # Of 0.0141 with 4 degrees of freedom, which reach 2.776 of it: not wider than the seeds alone.
        "new seeds and new stories together: -0.100 nats (95 % CI -0.143 to -0.057)",
        "seed noise of base: standard deviation 0.0123 nats over 5 seeds",
        "correlation of the arms over 3 seeds: 0.88; pairing by seed removes that part of the noise",
        "speed: 1.50x faster (1.40 to 1.60)",
        "memory of training: 2.00x less memory (one pair)",
        "energy: not measured",
        "for an equal loss, that at which the worse of the two ends: 1.50x fewer tokens (1.40 to "
        "1.60), 1.50x fewer FLOPs (1.40 to 1.60)",
        "at equal training time: -0.200 nats (95 % CI -0.143 to -0.057), read off the curves of the "
        "estimates during training; arm had done 80% of its schedule by then",
        "not finished: arm, seed 4: unfinished",
        "a note",
    ]
    alone = dataclasses.replace(c, judgement=Judgement(CLEAR, alpha=0.0125), paired=False)
    assert "; at this look -0.1886" in detail_lines(alone)[0]
    assert ", its own variance, " in detail_lines(alone)[0]
    plain = dataclasses.replace(c, judgement=Judgement(CLEAR), correlation=-0.5)
    assert detail_lines(plain)[0].startswith("recipes: -0.100 nats (95 % CI -0.143 to -0.057), mod")
    assert "correlation of the arms over 3 seeds: -0.50" in detail_lines(plain)
    void = detail_lines(dataclasses.replace(c, confounds=("other data",)))
    assert void[0].startswith("these models") and "differs: other data" in void
    assert not any("recipes" in line or "equal" in line or "new seeds" in line for line in void)
    lost = detail_lines(dataclasses.replace(c, diverged=(3, 0), ended=(3, 0)))
    # Clopper and Pearson: 0.025 ** (1 / 3) is 29 %.
    assert "arm diverged in 3 of 3 seeds (95 % CI 29% to 100%)" in lost
    assert "the two are not shown to differ in that (Fisher's exact test, p 1)" in lost
    sure = detail_lines(dataclasses.replace(c, diverged=(5, 0), ended=(5, 5)))
    assert "the two diverge with different chances (Fisher's exact test, p 0.0079)" in sure
