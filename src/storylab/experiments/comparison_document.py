"""Comparisons and outcomes as the values that ``--json`` prints."""

from __future__ import annotations

from msgspec import structs

from storylab.documents.compared import (
    ComparedArm,
    DifferenceInterval,
    EqualLossRatios,
    EqualTimeDifference,
    PairedRatio,
    SeedNoise,
    VerdictInterval,
)
from storylab.documents.experiment import (
    CheckedExpectation,
    EstimatedEffect,
    ExperimentDocument,
    PlanChange,
    RegisteredPlan,
    TakenLook,
    TestOpening,
)
from storylab.experiments.comparison import (
    EQUIVALENT,
    Comparison,
    EqualTime,
    Ratio,
    Reach,
    exit_code,
)
from storylab.experiments.effect_words import effect_line
from storylab.experiments.effects import NO_INTERACTION, EffectResult
from storylab.experiments.measures import Checked
from storylab.experiments.outcome import Outcome
from storylab.experiments.registration import registration_lines
from storylab.experiments.statistics import ALPHA, Interval
from storylab.experiments.verdicts import verdict_line
from storylab.record.experiment_schema import ExperimentRecord


def compared_arm(c: Comparison) -> ComparedArm:
    """A comparison as values: a line for each field, so it is longer than other functions."""
    j = c.judgement
    return ComparedArm(
        arm=c.arm,
        baseline=c.baseline,
        condition=c.condition or None,
        verdict=c.verdict,
        exit_code=exit_code([c.verdict]),
        exploratory=list(c.exploratory),
        preliminary=c.preliminary,
        settled=c.settled,
        difference_nats_per_token=c.recipes.estimate if c.recipes else None,
        verdict_interval=_verdict_interval(c),
        recipes=_difference(c.recipes),
        variance=j.variance,
        margin_nats_per_token=j.margin,
        different=j.different,
        equivalent=j.equivalent,
        e_value=j.e,
        e_value_needed=j.family / ALPHA,
        look=j.look,
        next_look=j.next_look,
        extra_seeds=j.extra_seeds,
        seeds=list(c.seeds),
        baseline_seeds=list(c.baseline_seeds),
        pairs=c.pairs,
        paired=c.paired,
        correlation=c.correlation,
        ended_runs=c.ended[0],
        diverged_runs=c.diverged[0],
        baseline_ended_runs=c.ended[1],
        baseline_diverged_runs=c.diverged[1],
        stories=_difference(c.stories),
        seeds_and_stories=_difference(c.over_both),
        noise=_noise(c),
        confounds=list(c.confounds),
        speed_confounds=list(c.speed_confounds),
        notes=list(c.notes),
        failures=list(c.failures),
        speed=_ratio(c.speed),
        memory=_ratio(c.memory),
        energy=_ratio(c.energy),
        equal_time=_equal_time(c.equal_time),
        equal_loss=_equal_loss(c.reach),
        sentence=verdict_line(c),
    )


def estimated_effect(e: EffectResult) -> EstimatedEffect:
    """An effect of a factorial experiment as values."""
    j = e.judgement
    return EstimatedEffect(
        effect=e.name,
        condition=e.condition or None,
        levels=e.change or None,
        interaction=e.is_interaction,
        aliases=list(e.aliases),
        verdict=e.verdict,
        exploratory=list(e.exploratory),
        preliminary=e.preliminary,
        settled=e.settled,
        difference_nats_per_token=j.interval.estimate if j.interval else None,
        verdict_interval=_verdict_interval(e),
        recipes=_difference(None if e.ends is None else j.interval),
        variance=j.variance,
        margin_nats_per_token=j.margin,
        e_value=j.e,
        e_value_needed=j.family / ALPHA,
        look=j.look,
        next_look=j.next_look,
        seeds=j.interval.n if j.interval else 0,
        speed=_ratio(e.speed),
        sentence=effect_line(e),
    )


def _verdict_interval(c: Comparison | EffectResult) -> VerdictInterval | None:
    if c.ends is None:
        return None
    sides = 2 if c.verdict in (EQUIVALENT, NO_INTERACTION) else 1
    return VerdictInterval(
        low_nats_per_token=c.ends[0],
        high_nats_per_token=c.ends[1],
        level=1 - sides * c.judgement.alpha,
        holds_for_arms=c.judgement.family,
    )


def _difference(interval: Interval | None) -> DifferenceInterval | None:
    if interval is None:
        return None
    return DifferenceInterval(
        difference_nats_per_token=interval.estimate,
        standard_error_nats_per_token=interval.standard_error,
        low_nats_per_token=interval.low,
        high_nats_per_token=interval.high,
        degrees_of_freedom=interval.df,
        values=interval.n,
        p_value=interval.p,
    )


def _noise(c: Comparison) -> SeedNoise | None:
    if c.noise is None:
        return None
    return SeedNoise(
        mean_nats_per_token=c.noise.mean,
        standard_deviation_nats_per_token=c.noise.standard_deviation,
        seeds=c.noise.seeds,
    )


def _ratio(ratio: Ratio | None) -> PairedRatio | None:
    if ratio is None:
        return None
    return PairedRatio(value=ratio.value, low=ratio.low, high=ratio.high, pairs=ratio.pairs)


def _equal_time(e: EqualTime | None) -> EqualTimeDifference | None:
    if e is None:
        return None
    return EqualTimeDifference(
        difference_nats_per_token=e.difference,
        low_nats_per_token=e.interval.low if e.interval else None,
        high_nats_per_token=e.interval.high if e.interval else None,
        slower=e.slower,
        slower_progress=e.progress,
    )


def _equal_loss(reach: Reach | None) -> EqualLossRatios | None:
    tokens, flops = (_ratio(reach.tokens), _ratio(reach.flops)) if reach else (None, None)
    if reach is None or tokens is None or flops is None:
        return None
    return EqualLossRatios(tokens=tokens, flops=flops, seconds=_ratio(reach.seconds))


def experiment_document(outcome: Outcome) -> ExperimentDocument:
    """An experiment's outcome as values."""
    record = outcome.record
    return ExperimentDocument(
        name=outcome.label,
        title=record.title,
        scale=record.scale or None,
        stage=record.stage,
        factor=record.factor or None,
        baseline=record.baseline,
        arms=list(record.arms),
        conditions=[condition for condition in record.conditions if condition],
        seeds=list(record.seeds),
        looks=list(record.looks),
        variance=record.variance,
        margin_nats_per_token=record.margin,
        registration=_registration(record),
        amendments=_amendments(record),
        looks_taken=[TakenLook(**structs.asdict(look)) for look in record.looks_taken],
        openings=[TestOpening(**structs.asdict(opening)) for opening in record.openings],
        comparisons=[compared_arm(c) for c in outcome.comparisons],
        exit_code=exit_code(outcome.verdicts),
        effects=[estimated_effect(e) for e in outcome.effects],
        expectations=[_expectation(checked) for checked in outcome.expectations],
        problems=list(outcome.problems),
    )


def _registration(record: ExperimentRecord) -> RegisteredPlan | None:
    found = record.registered
    if found is None:
        return None
    return RegisteredPlan(
        sha256=found.sha256,
        time=found.time,
        runs_finished=found.runs_finished,
        runs_shared=found.runs_shared,
        differences_known=found.differences_known,
        runs_planned=found.runs_planned,
    )


def _amendments(record: ExperimentRecord) -> list[PlanChange]:
    # The first line is the registration; a record without one has no amendments.
    sentences = registration_lines(record)[1:]
    return [
        PlanChange(
            key=change.what,
            time=change.time,
            runs_finished=change.runs_finished,
            runs_planned=change.runs_planned,
            sentence=sentence,
        )
        for change, sentence in zip(record.amendments, sentences, strict=False)
    ]


def _expectation(checked: Checked) -> CheckedExpectation:
    e = checked.expectation
    return CheckedExpectation(
        text=e.text,
        metric=e.metric,
        arm=e.arm,
        condition=checked.condition or None,
        at_least=e.at_least,
        at_most=e.at_most,
        value=checked.value,
        low=checked.low,
        high=checked.high,
        met=checked.met,
    )
