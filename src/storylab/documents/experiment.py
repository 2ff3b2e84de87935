"""The document of ``storylab experiment run --json``, and of ``experiment confirm``."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from storylab.documents.compared import (
    ComparedArm,
    DifferenceInterval,
    PairedRatio,
    VerdictInterval,
)
from storylab.documents.fields import about


class RegisteredPlan(Struct, frozen=True, kw_only=True):
    """The plan as it was before the first run."""

    sha256: Annotated[str, about("of the plan as canonical JSON")]
    time: Annotated[str, about("when it was registered, as ISO 8601 with its offset from UTC")]
    runs_finished: Annotated[int, about("runs of the experiment that had ended by then")]
    runs_shared: Annotated[int, about("of these, runs that another experiment had listed")]
    differences_known: Annotated[
        int, about("pairs of an arm's and the baseline's run that had both ended by then")
    ]
    runs_planned: Annotated[int, about("all runs of the plan")]


class PlanChange(Struct, frozen=True, kw_only=True):
    """A change after the plan was registered."""

    key: Annotated[
        str, about("key of the plan; or `record`, begun again, or `runs`, all trained again")
    ]
    time: Annotated[str, about("when it changed, as ISO 8601 with its offset from UTC")]
    runs_finished: Annotated[int, about("runs that had ended by then")]
    runs_planned: Annotated[int, about("all runs by then")]
    sentence: Annotated[str, about("the change in words, for people; its wording may change")]


class TakenLook(Struct, frozen=True, kw_only=True):
    """Verdicts that somebody was shown."""

    time: Annotated[str, about("when, as ISO 8601 with its offset from UTC")]
    seeds: Annotated[int, about("seeds that every arm not yet settled had by then")]
    settled: Annotated[list[str], about("arms, with their condition, settled at this look")]


class TestOpening(Struct, frozen=True, kw_only=True):
    """Losses on the test split that somebody was shown."""

    time: Annotated[str, about("when, as ISO 8601 with its offset from UTC")]
    seeds: Annotated[int, about("seeds that the losses were of")]


class CheckedExpectation(Struct, frozen=True, kw_only=True):
    """A number that the hypothesis names, with the measured one."""

    text: Annotated[str, about("the expectation in the words of the file")]
    metric: Annotated[str, about("name of the metric, which has its unit in the file's guide")]
    arm: Annotated[str, about("name of the arm")]
    condition: Annotated[str | None, about("the condition of the experiment; null without one")]
    at_least: Annotated[float | None, about("lower bound of the expectation; null: none")]
    at_most: Annotated[float | None, about("upper bound of the expectation; null: none")]
    value: Annotated[float | None, about("the measured number; null: not measured")]
    low: Annotated[float | None, about("lower end of its 95 % interval; null without one")]
    high: Annotated[float | None, about("upper end of its 95 % interval; null without one")]
    met: Annotated[bool | None, about("whether it is within the bounds; null: not resolved")]


class EstimatedEffect(Struct, frozen=True, kw_only=True):
    """A main effect of a factorial experiment, or an interaction of two factors."""

    effect: Annotated[str, about("names of its factors, joined by ` x `")]
    condition: Annotated[str | None, about("the condition of the experiment; null without one")]
    levels: Annotated[str | None, about("second level vs first; null for an interaction")]
    interaction: Annotated[bool, about("whether it is an interaction")]
    aliases: Annotated[list[str], about("effects that share its estimate in a fraction")]
    verdict: Annotated[str, about("as in the guide to experiments")]
    exploratory: Annotated[list[str], about("why the verdict is exploratory; empty if it is not")]
    preliminary: Annotated[bool, about("whether it rests on fewer than 5 seeds")]
    settled: Annotated[bool, about("whether more seeds are of no use to it")]
    difference_nats_per_token: Annotated[
        float | None,
        about("second level minus first, or the difference of differences", "nats per token"),
    ]
    verdict_interval: Annotated[
        VerdictInterval | None, about("the interval that belongs to the verdict; null without one")
    ]
    recipes: Annotated[
        DifferenceInterval | None,
        about("the effect over new seeds; null if no loss is compared"),
    ]
    variance: Annotated[
        str, about("how the noise of an effect is estimated: `moderated`, `own` or `pooled`")
    ]
    margin_nats_per_token: Annotated[
        float | None,
        about("largest effect that counts as none; null: none is set", "nats per token"),
    ]
    e_value: Annotated[
        float | None,
        about("evidence of all seeds, valid at any look; null where no seed is unplanned"),
    ]
    e_value_needed: Annotated[float, about("the e-value that would show an effect")]
    look: Annotated[int | None, about("seeds at the look that judged it; null before the first")]
    next_look: Annotated[int | None, about("seeds at the next look; null if there is none")]
    seeds: Annotated[int, about("seeds that it rests on")]
    speed: Annotated[
        PairedRatio | None,
        about("tokens a second, second level over first; null for interactions"),
    ]
    sentence: Annotated[str, about("the effect in words, for people; its wording may change")]


class ExperimentDocument(
    Struct, frozen=True, kw_only=True, tag_field="schema", tag="storylab.experiment/1"
):
    """An experiment: its plan, and its arms compared with the baseline."""

    name: Annotated[str, about("name of the record in `RUNS/experiments`, without `.json`")]
    title: Annotated[str, about("title of the file")]
    scale: Annotated[str | None, about("the scale that was run; null for a file without scales")]
    stage: Annotated[str, about("`search` or `confirm`")]
    factor: Annotated[str | None, about("the setting that the arms differ in; null: none")]
    baseline: Annotated[str, about("name of the arm that the others are compared with")]
    arms: Annotated[list[str], about("names of all arms")]
    conditions: Annotated[list[str], about("names of the conditions; empty without any")]
    seeds: Annotated[list[int], about("seeds of the plan")]
    looks: Annotated[list[int], about("seeds at the planned looks; empty in older records")]
    variance: Annotated[str, about("how the plan estimates noise: `moderated`, `own` or `pooled`")]
    margin_nats_per_token: Annotated[
        float | None,
        about("largest difference that counts as none; null: none is set", "nats per token"),
    ]
    registration: Annotated[RegisteredPlan | None, about("null in records of older versions")]
    amendments: Annotated[list[PlanChange], about("every later change of the plan")]
    looks_taken: Annotated[list[TakenLook], about("every look that was taken")]
    openings: Annotated[list[TestOpening], about("every opening of the test split")]
    comparisons: Annotated[
        list[ComparedArm], about("one for every arm but the baseline, under every condition")
    ]
    effects: Annotated[
        list[EstimatedEffect],
        about("of a factorial experiment, whose verdicts these are; else empty"),
    ]
    exit_code: Annotated[
        int,
        about("code of all verdicts with `--exit_code`; of main effects in a factorial experiment"),
    ]
    expectations: Annotated[
        list[CheckedExpectation], about("the expectations of the file, with what was measured")
    ]
    problems: Annotated[list[str], about("runs that are missing or damaged, one line each")]
