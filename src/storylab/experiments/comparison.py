"""Decide whether one recipe is better than another, by how much, and whether they may be compared.

Two questions are separate: whether two trained models differ on stories like these (paired by
story, the runs as they are), and whether one recipe is better than the other (paired by seed: the
same initial weights and data order in both arms). The verdict answers the second.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from storylab.errors import UserError
from storylab.experiments import statistics
from storylab.experiments.factors import (
    WEIGHT_FIELDS,
    changed_fields,
    infer_factor,
    unexplained,
)
from storylab.experiments.statistics import ALPHA, Interval
from storylab.files import exists
from storylab.record.folder import CONFIG
from storylab.record.index import RunCache, run_folders
from storylab.record.run import Run

BETTER, WORSE, EQUIVALENT = "better", "worse", "equivalent"
NO_DIFFERENCE, CANT_TELL, CONFOUNDED = "no difference seen", "can't tell", "confounded"
DIVERGED = "diverged"
# Mean and median speed further apart than this show that the machine did other work.
UNSTEADY = 0.05


@dataclass(frozen=True)
class Arm:
    """A recipe and its runs, one for each seed."""

    name: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that were trained to their end."""
        return tuple(run for run in self.runs if run.finished)

    @property
    def losses(self) -> list[float]:
        """Final validation losses of the finished runs."""
        return [run.loss for run in self.finished]


@dataclass(frozen=True)
class Ratio:
    """A paired ratio arm / baseline, geometric mean over seeds, with its 95 % interval."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Noise:
    """Spread of the final loss over seeds of one recipe."""

    standard_deviation: float
    seeds: int


@dataclass(frozen=True)
class EqualTime:
    """Difference of validation loss after the total training seconds of the faster arm.

    Read off both curves, of the estimate on a few fixed windows: ``progress`` is the share of its
    schedule that the slower arm had done by then, so its learning rate had not come down as far.
    """

    difference: float
    low: float | None
    high: float | None
    progress: float
    slower: str


@dataclass(frozen=True)
class Comparison:
    """An arm compared with its baseline. Losses in nats, arm minus baseline."""

    arm: str
    baseline: str
    condition: str
    confounds: tuple[str, ...]
    speed_confounds: tuple[str, ...]
    notes: tuple[str, ...]
    pairs: int
    paired: bool
    recipes: Interval | None
    from_noise: bool
    stories: Interval | None
    noise: Noise | None
    margin: float | None
    speed: Ratio | None
    memory: Ratio | None
    energy: Ratio | None
    equal_time: EqualTime | None
    failures: tuple[str, ...]
    diverged: int = 0
    """Runs of the arm that diverged."""
    baseline_diverged: int = 0
    adjusted_p: float | None = None
    adjusted_equivalence_p: float | None = None
    family: int = 1

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, ``equivalent``, ``no difference seen``, ``can't tell``,
        ``diverged`` or ``confounded``; corrected for the number of comparisons made together."""
        if self.confounds:
            return CONFOUNDED
        # The runs that are left are a biased choice: those that happened not to diverge.
        if self.diverged and not self.baseline_diverged:
            return DIVERGED
        if self.baseline_diverged:
            return CANT_TELL
        if self.recipes is None or self.adjusted_p is None:
            return CANT_TELL
        equivalence = self.adjusted_equivalence_p
        if equivalence is not None and equivalence < ALPHA:
            return EQUIVALENT
        if self.adjusted_p < ALPHA:
            return BETTER if self.recipes.estimate < 0 else WORSE
        # A difference that fails only because of the correction is no proof of equality either.
        return CANT_TELL if self.recipes.p < ALPHA else NO_DIFFERENCE

    @property
    def spread(self) -> float | None:
        """Standard deviation of the paired differences between seeds."""
        if self.recipes is None:
            return math.sqrt(2) * self.noise.standard_deviation if self.noise else None
        return self.recipes.standard_error * math.sqrt(self.recipes.n)

    @property
    def alpha(self) -> float:
        """Level that a single comparison must reach at worst, for the number made together."""
        return ALPHA / self.family

    @property
    def detectable(self) -> float | None:
        """The true difference that this many pairs would find with a chance of 80 %."""
        if self.recipes is None or self.spread is None:
            return None
        if self.recipes.n < 2:
            return statistics.detectable_by_noise(self.recipes, self.alpha)
        return statistics.detectable_difference(self.spread, self.recipes.n, self.alpha)

    @property
    def seeds_needed(self) -> int | None:
        """Pairs that would find a difference as large as the one seen, with a chance of 80 %."""
        if self.spread is None:
            return None
        difference = self.recipes.estimate if self.recipes else None
        if difference is None and self.stories is not None:
            difference = self.stories.estimate
        if not difference:
            return None
        return statistics.seeds_needed(difference, self.spread, self.alpha)


def compare_arms(
    arm: Arm,
    baseline: Arm,
    allowed: frozenset[str],
    condition: str = "",
    margin: float | None = None,
    noise: Noise | None = None,
    cache: RunCache | None = None,
) -> Comparison:
    """Compare ``arm`` with ``baseline``.

    Args:
        arm: its runs; those of the baseline's seeds are paired.
        baseline: the arm to compare with.
        allowed: config fields in which the two may differ: the factor's.
        condition: under which condition both were run, for the report.
        margin: the largest difference in nats that counts as none; None for no test of equivalence.
        noise: spread over seeds of the baseline's recipe; by default that of the baseline's runs;
            for a single run, that of the other seeds in its folder.
        cache: runs that have been read already.
    """
    pairs, paired = _pair(arm, baseline)
    # Without pairs every run of one arm is compared with every run of the other.
    met = pairs if paired else [(a, b) for a in arm.finished for b in baseline.finished]
    confounds = dict.fromkeys(c for pair in met for c in _confounds(*pair, allowed, paired))
    speed_confounds = dict.fromkeys(c for pair in met for c in _speed_confounds(*pair))
    if noise is None:
        noise = noise_of(baseline.finished)
    if noise is None and baseline.finished:
        noise = noise_floor(baseline.finished[0], cache)
    recipes = _recipe_interval(arm, baseline, pairs, paired)
    from_noise = recipes is None and noise is not None and len(pairs) == 1
    if from_noise and noise is not None:
        difference = pairs[0][0].loss - pairs[0][1].loss
        recipes = statistics.noise_interval(difference, noise.standard_deviation, noise.seeds - 1)
    comparison = Comparison(
        arm=arm.name,
        baseline=baseline.name,
        condition=condition,
        confounds=tuple(confounds),
        speed_confounds=tuple(speed_confounds),
        notes=tuple(_notes(arm, baseline, pairs)),
        pairs=len(pairs),
        paired=paired,
        recipes=recipes,
        from_noise=from_noise,
        stories=_story_interval(pairs) if not confounds else None,
        noise=noise,
        margin=margin,
        speed=_ratio([(a.speed, b.speed) for a, b in pairs]),
        memory=_ratio([(a.training_memory, b.training_memory) for a, b in pairs]),
        energy=_ratio([(a.results.energy_joules, b.results.energy_joules) for a, b in pairs]),
        equal_time=_equal_time(arm, baseline, pairs) if paired and not speed_confounds else None,
        failures=tuple(
            f"{side.name}, seed {run.config.seed}: {run.state}"
            + f" ({run.reason})" * bool(run.reason)
            for side in (arm, baseline)
            for run in side.runs
            if not run.finished
        ),
        diverged=sum(run.state == "diverged" for run in arm.runs),
        baseline_diverged=sum(run.state == "diverged" for run in baseline.runs),
    )
    return correct([comparison])[0]


def _pair(arm: Arm, baseline: Arm) -> tuple[list[tuple[Run, Run]], bool]:
    """Runs of the two with the same seeds, and True; if no seed is shared, all runs in order, and False."""
    ours = {run.seeds: run for run in arm.finished}
    theirs = {run.seeds: run for run in baseline.finished}
    pairs = [(ours[seeds], theirs[seeds]) for seeds in ours if seeds in theirs]
    if pairs:
        return pairs, True
    return list(zip(arm.finished, baseline.finished, strict=False)), False


def _recipe_interval(
    arm: Arm, baseline: Arm, pairs: Sequence[tuple[Run, Run]], paired: bool
) -> Interval | None:
    """Difference of the final losses, over the seeds; None for too few of them."""
    if paired:
        return statistics.mean_interval([a.loss - b.loss for a, b in pairs])
    return statistics.unpaired_interval(arm.losses, baseline.losses) if pairs else None


def correct(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with p-values corrected for their number, by Holm's method."""
    tested = [c for c in comparisons if c.recipes is not None and not c.confounds]
    ps = statistics.holm([c.recipes.p for c in tested if c.recipes])
    equal = [c for c in tested if c.margin is not None]
    equivalences = statistics.holm(
        [c.recipes.equivalence_p(c.margin) for c in equal if c.recipes and c.margin]
    )
    by_id = {
        id(c): {"adjusted_p": p, "family": len(tested)} for c, p in zip(tested, ps, strict=True)
    }
    for c, p in zip(equal, equivalences, strict=True):
        by_id[id(c)]["adjusted_equivalence_p"] = p
    nothing: dict[str, Any] = {}
    return [dataclasses.replace(c, **by_id.get(id(c), nothing)) for c in comparisons]


def noise_of(runs: Iterable[Run]) -> Noise | None:
    """Spread of final losses of one recipe over its seeds; None for fewer than two seeds, and where
    all are the same to the bit, as nothing is known then."""
    losses = list({run.seeds: run.loss for run in runs if run.finished}.values())
    if len(losses) < 2 or len(set(losses)) < 2:
        return None
    return Noise(float(np.std(losses, ddof=1)), len(losses))


def noise_floor(run: Run, cache: RunCache | None = None) -> Noise | None:
    """Spread of the final loss over seeds: of the runs in the same folder with the same config, data and
    code."""
    alike, _ = other_seeds(run, cache)
    return noise_of(alike)


def other_seeds(run: Run, cache: RunCache | None = None) -> tuple[list[Run], list[str]]:
    """The run and those in the same folder with the same config (except seeds), data and code; and
    the faults of unreadable ones."""
    cache = cache or RunCache()
    alike, problems = [run], []
    for folder in run_folders(run.folder.parent):
        try:
            if not exists(folder / CONFIG):
                continue
            head = cache.head(folder)
            same_data = head.data.fingerprint == run.data.fingerprint
            if same_data and not changed_fields(head.config, run.config):
                alike.append(cache.load(folder))
        except UserError as error:
            problems.append(str(error))
    return [other for other in alike if other.code_versions == run.code_versions], problems


def group_runs(results: Iterable[Run]) -> list[Arm]:
    """Group runs of the same recipe and data into arms, in order of their first run."""
    groups: list[list[Run]] = []
    for result in results:
        for group in groups:
            same_data = group[0].data.fingerprint == result.data.fingerprint
            if same_data and not changed_fields(group[0].config, result.config):
                if result.seeds not in {run.seeds for run in group}:
                    group.append(result)
                break
        else:
            groups.append([result])
    return [Arm(_arm_name(group, groups[0]), tuple(group)) for group in groups]


def compare_runs(results: Sequence[Run], margin: float | None = None) -> list[Comparison]:
    """Group ``results`` into arms and compare each with the first; a seed counts once.

    The difference between two arms is the factor if one factor covers it; else they are confounded.
    """
    baseline, *arms = group_runs(results)
    comparisons = []
    for arm in arms:
        changed = set(changed_fields(baseline.runs[0].config, arm.runs[0].config))
        factor = infer_factor(changed)
        allowed = frozenset(changed) if factor else frozenset()
        comparisons.append(compare_arms(arm, baseline, allowed, margin=margin))
    return correct(comparisons)


def _arm_name(group: Sequence[Run], first: Sequence[Run]) -> str:
    """Name of an arm: the folder of its first run, and the difference of its config to the first
    group's."""
    changed = changed_fields(first[0].config, group[0].config)
    name = group[0].folder.name
    if not changed or len(changed) > 3:
        return name
    return f"{name} ({', '.join(f'{field} {value}' for field, (_, value) in changed.items())})"


def _confounds(a: Run, b: Run, allowed: frozenset[str], paired: bool) -> Iterable[str]:
    """Everything but the factor in which two runs differ and that can move the loss."""
    changed = changed_fields(a.config, b.config)
    for name, (one, other) in unexplained(a.config, b.config, allowed).items():
        yield f"{name}: {one} against {other}"
    if a.data.fingerprint != b.data.fingerprint:
        yield f"data: fingerprint {a.data.fingerprint[:12]} against {b.data.fingerprint[:12]}"
    elif a.story_losses.shape != b.story_losses.shape or not np.array_equal(
        a.story_losses[:, 1], b.story_losses[:, 1]
    ):
        yield "evaluation: other stories or tokens"
    same_weights = not WEIGHT_FIELDS & set(changed)
    ours, theirs = a.environment, b.environment
    if paired and same_weights and ours.initial_weights_sha256 != theirs.initial_weights_sha256:
        yield "initial weights: other hashes for the same seed"
    same_batch = a.config.block_size == b.config.block_size
    same_batch &= a.config.tokens_per_iteration == b.config.tokens_per_iteration
    if paired and same_batch and ours.first_batch_sha256 != theirs.first_batch_sha256:
        yield "data order: other first batches for the same seed"
    versions = a.code_versions | b.code_versions
    if len(versions) > 1:
        yield f"code: {len(versions)} versions ({', '.join(sorted(v[:8] for v in versions))})"
    for package in ("torch", "numpy"):
        yield from _differences(
            package, *({getattr(stage.packages, package) for stage in run.stages} for run in (a, b))
        )


def _speed_confounds(a: Run, b: Run) -> Iterable[str]:
    """Everything but the factor that can move two runs' speed, memory and energy."""
    for key in ("processor", "cpu", "cores", "threads"):
        yield from _differences(
            key, *({getattr(stage, key) for stage in run.stages} for run in (a, b))
        )
    for key in ("gpu", "device"):  # recorded at the start only, as a resumed run keeps its device
        yield from _differences(key, *({getattr(run.environment, key)} for run in (a, b)))
    yield from _differences(
        "platform", *({stage.platform for stage in run.stages} for run in (a, b))
    )
    if any(run.results.emulated for run in (a, b)):
        yield "emulated precision, whose time and memory are no measure of hardware"
    if a.config.block_size == b.config.block_size and a.config.batch_size != b.config.batch_size:
        yield f"micro-batch: {a.config.batch_size} against {b.config.batch_size} sequences"


def _differences(name: str, ours: set[Any], theirs: set[Any]) -> Iterable[str]:
    if len(ours | theirs) > 1:
        a, b = (" and ".join(sorted(map(str, values))) for values in (ours, theirs))
        yield f"{name}: {a} against {b}"


def _notes(arm: Arm, baseline: Arm, pairs: Sequence[tuple[Run, Run]]) -> Iterable[str]:
    """Facts for the reader that do not make the comparison void."""
    for side in (arm, baseline):
        resumed = sum(bool(run.environment.resumed) for run in side.runs)
        if resumed:
            yield f"{resumed} of {len(side.runs)} runs of {side.name} were resumed"
    for side in (arm, baseline):
        unsteady = [run for run in side.finished if _unsteady(run)]
        if unsteady:
            yield (
                f"speed of {side.name}: in {len(unsteady)} of {len(side.finished)} runs mean and "
                "median differ by over 5 %, so the machine did other work; medians are compared"
            )
    lost = len(arm.runs) - len(arm.finished)
    if lost and arm.finished:
        yield (
            f"{lost} of {len(arm.runs)} runs of {arm.name} did not finish: the difference is that of "
            "the others"
        )


def _unsteady(run: Run) -> bool:
    mean = run.results.tokens_per_second
    return run.speed is not None and abs(run.speed / mean - 1) > UNSTEADY


def _story_interval(pairs: Sequence[tuple[Run, Run]]) -> Interval | None:
    """Paired by story: each story's loss is the mean over the runs of an arm."""
    if not pairs:
        return None
    arm = np.mean([a.story_losses[:, 0] for a, _ in pairs], axis=0)
    baseline = np.mean([b.story_losses[:, 0] for _, b in pairs], axis=0)
    return statistics.story_interval(arm, baseline, pairs[0][0].story_losses[:, 1])


def _ratio(values: Sequence[tuple[Any, ...]]) -> Ratio | None:
    if not values or not all(x and y for x, y in values):
        return None
    return Ratio(*statistics.ratio_interval([x for x, _ in values], [y for _, y in values]))


def _equal_time(arm: Arm, baseline: Arm, pairs: Sequence[tuple[Run, Run]]) -> EqualTime | None:
    """The difference at the time when the faster run of each pair ended, read off the curves."""
    differences, progress = [], []
    slower_arm = 0
    for a, b in pairs:
        curves = [[(e.seconds, e.val_loss) for e in run.evaluations] for run in (a, b)]
        if min(len(curve) for curve in curves) < 2:
            return None
        ends = [curve[-1][0] for curve in curves]
        at = min(ends)
        if at < max(curve[0][0] for curve in curves):
            return None
        ours, theirs = (_interpolated(curve, at) for curve in curves)
        differences.append(ours - theirs)
        progress.append(at / max(ends))
        slower_arm += ends[0] > ends[1]
    if not differences:
        return None
    interval = statistics.mean_interval(differences)
    return EqualTime(
        float(np.mean(differences)),
        interval.low if interval else None,
        interval.high if interval else None,
        float(np.mean(progress)),
        arm.name if 2 * slower_arm > len(pairs) else baseline.name,
    )


def _interpolated(curve: Sequence[tuple[float, float]], seconds: float) -> float:
    times, losses = zip(*curve, strict=True)
    return float(np.interp(math.log(seconds), np.log(times), losses))
