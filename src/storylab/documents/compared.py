"""An arm compared with its baseline, as ``compare --json`` and ``experiment run --json`` print it."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from storylab.documents.fields import about


class VerdictInterval(Struct, frozen=True, kw_only=True):
    """The interval that belongs to the verdict."""

    low_nats_per_token: Annotated[float, about("its lower end", "nats per token")]
    high_nats_per_token: Annotated[float, about("its upper end", "nats per token")]
    level: Annotated[float, about("confidence of this interval by itself, such as 0.995")]
    holds_for_arms: Annotated[
        int, about("arms whose intervals hold together with the 95 % of the whole experiment")
    ]


class DifferenceInterval(Struct, frozen=True, kw_only=True):
    """A difference with its 95 % interval, not corrected for other arms or looks."""

    difference_nats_per_token: Annotated[float, about("arm minus baseline", "nats per token")]
    standard_error_nats_per_token: Annotated[float, about("its standard error", "nats per token")]
    low_nats_per_token: Annotated[float, about("lower end", "nats per token")]
    high_nats_per_token: Annotated[float, about("upper end", "nats per token")]
    degrees_of_freedom: Annotated[float, about("of Student's t")]
    values: Annotated[int, about("seeds or stories that it rests on")]
    p_value: Annotated[float, about("of no difference, two-sided, not corrected")]


class SeedNoise(Struct, frozen=True, kw_only=True):
    """Mean and spread of the final loss over the seeds of the baseline's recipe."""

    mean_nats_per_token: Annotated[float, about("mean loss", "nats per token")]
    standard_deviation_nats_per_token: Annotated[float, about("over seeds", "nats per token")]
    seeds: Annotated[int, about("seeds that are known")]


class PairedRatio(Struct, frozen=True, kw_only=True):
    """A geometric mean of ratios over pairs, with its 95 % interval."""

    value: Annotated[float, about("the ratio")]
    low: Annotated[float | None, about("lower end; null for fewer than three pairs")]
    high: Annotated[float | None, about("upper end; null for fewer than three pairs")]
    pairs: Annotated[int, about("pairs of runs")]


class EqualTimeDifference(Struct, frozen=True, kw_only=True):
    """The difference after the total training time of the faster arm, read off both curves."""

    difference_nats_per_token: Annotated[float, about("arm minus baseline", "nats per token")]
    low_nats_per_token: Annotated[
        float | None, about("lower end of the 95 % interval; null: too few pairs", "nats per token")
    ]
    high_nats_per_token: Annotated[
        float | None, about("its upper end; null: too few pairs", "nats per token")
    ]
    slower: Annotated[str, about("name of the slower arm")]
    slower_progress: Annotated[float, about("share of its schedule that it had done by then")]


class EqualLossRatios(Struct, frozen=True, kw_only=True):
    """How many times less an arm needs for the loss at which the worse of the two ends.

    The ratio baseline / arm, read off the curves: above 1, the arm needs less.
    """

    tokens: Annotated[PairedRatio, about("of tokens")]
    flops: Annotated[PairedRatio, about("of FLOPs")]
    seconds: Annotated[
        PairedRatio | None, about("of training seconds; null if speeds are not comparable")
    ]


class ComparedArm(Struct, frozen=True, kw_only=True):
    """An arm compared with its baseline: a difference below zero says that the arm is better."""

    arm: Annotated[str, about("name of the arm")]
    baseline: Annotated[str, about("name of the arm that it is compared with")]
    condition: Annotated[str | None, about("the condition of the experiment; null without one")]
    verdict: Annotated[
        str,
        about(
            "`better`, `worse`, `equivalent`, `better by less than the margin`, `worse by less than "
            "the margin`, `undecided`, `diverged` or `confounded`"
        ),
    ]
    exit_code: Annotated[int, about("code of the verdict with `--exit_code`")]
    exploratory: Annotated[
        list[str], about("why the verdict is exploratory, a few words each; empty if it is not")
    ]
    preliminary: Annotated[bool, about("whether the verdict rests on fewer than five seeds")]
    settled: Annotated[bool, about("whether more seeds would add nothing to the verdict")]
    difference_nats_per_token: Annotated[
        float | None, about("of the recipes; null if no loss is compared", "nats per token")
    ]
    verdict_interval: Annotated[
        VerdictInterval | None,
        about(
            "the interval that belongs to the verdict; null if no loss is compared, or if the sign is "
            "settled and the size is not"
        ),
    ]
    recipes: Annotated[
        DifferenceInterval | None,
        about("the difference over new seeds; null if no loss is compared"),
    ]
    variance: Annotated[
        str, about("how the noise of a difference is estimated: `moderated`, `own` or `pooled`")
    ]
    margin_nats_per_token: Annotated[
        float | None,
        about("largest difference that counts as none; null: none is set", "nats per token"),
    ]
    different: Annotated[bool, about("whether a difference is shown, for all arms together")]
    equivalent: Annotated[
        bool,
        about("whether the difference is shown to be within the margin, for all arms together"),
    ]
    e_value: Annotated[
        float | None,
        about("evidence of all seeds, valid at any look; null where no seed is unplanned"),
    ]
    e_value_needed: Annotated[float, about("the e-value that would show a difference")]
    look: Annotated[
        int | None, about("seeds of the planned look that judged it; null: no plan, or not yet")
    ]
    next_look: Annotated[int | None, about("seeds of the next planned look; null: none")]
    extra_seeds: Annotated[
        int, about("finished seeds beyond the look, which the verdict leaves out")
    ]
    seeds: Annotated[list[int], about("seeds of the arm's runs that are compared")]
    baseline_seeds: Annotated[
        list[int], about("those of the baseline's runs; equal to `seeds` where `paired`")
    ]
    pairs: Annotated[int, about("pairs of runs behind the ratios and the stories")]
    paired: Annotated[bool, about("whether runs are compared with those of the same seeds")]
    correlation: Annotated[
        float | None,
        about("of the two arms' losses over common seeds; null for fewer than three"),
    ]
    ended_runs: Annotated[int, about("runs of the arm that finished or diverged")]
    diverged_runs: Annotated[int, about("of these, runs that diverged")]
    baseline_ended_runs: Annotated[int, about("runs of the baseline that finished or diverged")]
    baseline_diverged_runs: Annotated[int, about("of these, runs that diverged")]
    stories: Annotated[
        DifferenceInterval | None,
        about("the difference of these models over new stories; null if no loss is compared"),
    ]
    seeds_and_stories: Annotated[
        DifferenceInterval | None,
        about("the difference over new seeds and new stories together; null without both"),
    ]
    noise: Annotated[SeedNoise | None, about("of the baseline's recipe; null if not known")]
    confounds: Annotated[list[str], about("differences besides the factor that can move the loss")]
    speed_confounds: Annotated[list[str], about("differences that make speeds incomparable")]
    notes: Annotated[list[str], about("remarks, one line each")]
    failures: Annotated[list[str], about("runs that did not finish, one line each")]
    speed: Annotated[
        PairedRatio | None, about("tokens per second, arm / baseline; null if not measured")
    ]
    memory: Annotated[
        PairedRatio | None,
        about("peak memory of training steps, arm / baseline; null if not measured"),
    ]
    energy: Annotated[PairedRatio | None, about("energy, arm / baseline; null if not measured")]
    equal_time: Annotated[
        EqualTimeDifference | None,
        about("the difference at equal training time; null if the runs do not give it"),
    ]
    equal_loss: Annotated[
        EqualLossRatios | None,
        about("by how much less the arm reaches the same loss; null if the runs do not give it"),
    ]
    sentence: Annotated[str, about("the verdict in words, for people; its wording may change")]
