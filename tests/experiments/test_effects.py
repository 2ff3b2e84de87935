"""Effects of a factorial experiment as values and in words, of numbers that are made up."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import intervals_cover
from storylab.experiments.effect_words import effect_details, effect_line
from storylab.experiments.effects import (
    EffectResult,
    SimpleEffect,
    contrasts,
    effect_title,
    trial_of,
    verdicts_of,
)
from storylab.experiments.factorial import Effect
from storylab.experiments.family import Judgement
from storylab.experiments.statistics import Interval

CLEAR = Interval(-0.1, 0.01, 2, 3)  # 95 %: -0.143 to -0.057
CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))


def result(judgement: Judgement, factors: tuple[int, ...] = (0,), **changes: Any) -> EffectResult:
    nothing: dict[str, Any] = {
        "aliases": (),
        "confounds": (),
        "diverged": (),
        "lost": False,
        "left_out": (),
        "recovered": (),
        "simple": (),
        "speed": None,
    }
    main = len(factors) == 1
    names = {"name": "norm" if main else "norm x rate", "change": "on vs off" if main else ""}
    given = {"effect": Effect(factors), "condition": "", "judgement": judgement}
    return EffectResult(**(nothing | names | given | changes))


def test_an_effect_is_a_difference_of_means_and_an_interaction_one_of_differences() -> None:
    """Losses of the cells (0, 0), (0, 1), (1, 0), (1, 1) with two seeds."""
    losses = np.array([[3.0, 3.1], [3.2, 3.3], [2.9, 3.1], [2.7, 2.8]])
    assert contrasts(Effect((0,)), CELLS, losses) == pytest.approx([-0.3, -0.25])
    assert contrasts(Effect((1,)), CELLS, losses) == pytest.approx([0.0, -0.05])
    assert contrasts(Effect((0, 1)), CELLS, losses) == pytest.approx([-0.4, -0.5])


def test_the_trial_of_an_effect_has_its_differences_by_seed() -> None:
    losses = {1: [3.0, 3.2, 2.9, 2.7], 2: [3.1, 3.3, 3.1, 2.8]}
    found = trial_of(Effect((0,)), CELLS, losses, "long")
    assert found.differences == pytest.approx({1: -0.3, 2: -0.25})
    assert (found.group, found.ended, found.void) == ("long", {1, 2}, frozenset())
    other = trial_of(Effect((0, 1)), CELLS, losses, "", frozenset({1, 2, 3}), frozenset({2}))
    assert (other.ended, other.void) == ({1, 2, 3}, {2})
    # Half the weights of four cells each, against whole ones: twice the deviation.
    assert other.scale == 2 * found.scale


@pytest.mark.parametrize(
    ("judgement", "main", "interaction"),
    [
        (Judgement(CLEAR, different=True), "better", "interact"),
        (Judgement(CLEAR.scaled(-1), different=True), "worse", "interact"),
        (
            Judgement(CLEAR, different=True, equivalent=True, margin=0.2),
            "better by less than the margin",
            "interact by less than the margin",
        ),
        (
            Judgement(CLEAR, equivalent=True, margin=0.2),
            "equivalent",
            "no interaction within the margin",
        ),
        (Judgement(CLEAR), "undecided", "undecided"),
    ],
)
def test_verdicts_have_the_words_of_their_kind(
    judgement: Judgement, main: str, interaction: str
) -> None:
    effects = [result(judgement), result(judgement, (0, 1))]
    assert [effect.verdict for effect in effects] == [main, interaction]
    assert [effect.word for effect in effects] == [main, main]
    assert all(effect.settled is judgement.settled and effect.preliminary for effect in effects)
    assert all(effect.ends is not None for effect in effects)
    # Of a factorial experiment the main effects alone say what is better.
    assert verdicts_of([intervals_cover.comparison(judgement)] * 3, effects) == [main]
    assert verdicts_of([intervals_cover.comparison(judgement)], []) == [main]


def test_what_is_confounded_or_diverged_has_no_interval() -> None:
    j = Judgement(CLEAR, different=True)
    mixed, lost = result(j, confounds=("other data",)), result(j, diverged=("norm=on",))
    assert (mixed.word, mixed.ends, mixed.settled) == ("confounded", None, False)
    assert (lost.word, lost.ends, lost.settled) == ("diverged", None, False)
    assert dataclasses.replace(lost, lost=True).settled
    both = result(j, confounds=("other data",), diverged=("norm=on",))
    assert both.word == "confounded"
    for seeds in (5, 8):
        assert not result(Judgement(dataclasses.replace(CLEAR, n=seeds))).preliminary
    assert not result(Judgement()).preliminary


def test_effects_in_words() -> None:
    j = Judgement(CLEAR, different=True)
    held = result(j, condition="long", aliases=("a x b",), interacts_with=("rate",))
    assert effect_title(held) == "norm (on vs off) @ long"
    assert effect_line(held) == (
        "norm (on vs off) @ long: better by 0.100 nats (0.057 to 0.143). A mean over the levels of "
        "rate, which change it. It cannot be separated from a x b. 3 seeds: preliminary"
    )
    simple = (
        SimpleEffect("norm (on vs off)", "rate=low", CLEAR),
        SimpleEffect("norm (on vs off)", "rate=high", CLEAR.scaled(-1)),
    )
    pair = result(j, (0, 1), simple=simple)
    told = (
        "norm (on vs off): -0.100 (-0.143 to -0.057) with rate=low, +0.100 (+0.057 to +0.143) with"
    )
    assert effect_line(pair).startswith(
        "norm x rate: interact by 0.100 nats (0.057 to 0.143): both"
    )
    assert told in effect_line(pair)
    assert effect_details(pair) == [
        "-0.100 nats (95 % CI -0.143 to -0.057), moderated variance, p 0.0099"
    ]
    unsure = result(Judgement(CLEAR), (0, 1), simple=simple, left_out=("seed 4: no loss",))
    assert told not in effect_line(unsure) and effect_details(unsure)[1].startswith(told)
    assert effect_details(unsure)[-1] == "left out, seed 4: no loss"
    lost = result(j, diverged=("norm=on", "norm=off"))
    assert effect_line(lost) == (
        "norm (on vs off): diverged: runs of 2 cells did, so no loss is compared"
    )
    assert effect_details(lost) == ["diverged: norm=on", "diverged: norm=off"]
