"""An arm against a baseline: their pairs, their confounds, and the facts that a judgement needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from storylab.experiments import statistics
from storylab.experiments.comparison import DIVERGED, Arm, Noise
from storylab.experiments.confounds import loss_confounds, speed_confounds
from storylab.experiments.family import Trial
from storylab.experiments.noise import noise_floor, noise_of
from storylab.experiments.statistics import Interval
from storylab.record.index import RunCache
from storylab.record.run import Run

# Correlation of two near arms' losses over seeds, measured over 22 pairs of arms (docs/statistics.md): it
# decides, before any loss is seen, whether few shared seeds are better than all seeds unpaired.
EXPECTED_CORRELATION = 0.87


@dataclass(frozen=True)
class Contest:
    """An arm against a baseline.

    Args:
        arm: its runs.
        baseline: the arm to compare with.
        allowed: config fields in which the two may differ: the factor's.
        condition: under which condition both were run, for the report.
        noise: spread over seeds of the baseline's recipe; by default that of the baseline's runs;
            for a single run, that of the other seeds in its folder.
        cache: runs that have been read already.
    """

    arm: Arm
    baseline: Arm
    allowed: frozenset[str]
    condition: str = ""
    noise: Noise | None = None
    cache: RunCache | None = None

    def of_seeds(self, seeds: Collection[int]) -> Contest:
        """The contest with the runs of these seeds alone."""
        arm, baseline = (
            Arm(side.name, tuple(run for run in side.runs if run.config.seed in seeds))
            for side in (self.arm, self.baseline)
        )
        return dataclasses.replace(self, arm=arm, baseline=baseline)

    @cached_property
    def pairs(self) -> list[tuple[Run, Run]]:
        """Finished runs of the two with the same seeds."""
        ours = {run.seeds: run for run in self.arm.finished}
        theirs = {run.seeds: run for run in self.baseline.finished}
        return [(ours[seeds], theirs[seeds]) for seeds in ours if seeds in theirs]

    @cached_property
    def paired(self) -> bool:
        """Whether the runs are compared by seed; a design that is chosen before any loss is seen."""
        shared, sizes = len(self.pairs), [len(s.finished) for s in (self.arm, self.baseline)]
        if shared == min(sizes) or min(sizes) < 2:
            return shared > 0
        if shared < 2:
            return False
        by_seed = stats.t.isf(0.025, shared - 1) * math.sqrt(
            2 * (1 - EXPECTED_CORRELATION) / shared
        )
        of_all = stats.t.isf(0.025, sum(sizes) - 2) * math.sqrt(sum(1 / n for n in sizes))
        return bool(by_seed <= of_all)

    @cached_property
    def met(self) -> list[tuple[Run, Run]]:
        """The pairs; where runs are not paired, every run of one arm with every run of the other."""
        if self.paired:
            return self.pairs
        return [(a, b) for a in self.arm.finished for b in self.baseline.finished]

    @cached_property
    def confounds(self) -> tuple[str, ...]:
        """Everything but the factor in which the arms differ and that can move the loss."""
        found = (c for pair in self.met for c in loss_confounds(*pair, self.allowed, self.paired))
        return tuple(dict.fromkeys(found))

    @cached_property
    def speed_confounds(self) -> tuple[str, ...]:
        """Everything but the factor in which the arms differ and that can move their speed."""
        return tuple(dict.fromkeys(c for pair in self.met for c in speed_confounds(*pair)))

    @cached_property
    def known_noise(self) -> Noise | None:
        """The noise that was given, or that of the baseline's runs, or of the other seeds in the folder
        of a single one."""
        found = self.noise or noise_of(self.baseline.finished)
        if found is None and self.baseline.finished:
            found = noise_floor(self.baseline.finished[0], self.cache)
        return found

    @property
    def trial(self) -> Trial:
        """The facts that a judgement needs."""
        differences = {a.config.seed: a.loss - b.loss for a, b in self.pairs} if self.paired else {}
        ended = [
            {run.config.seed for run in side.runs if run.state != "unfinished"}
            for side in (self.arm, self.baseline)
        ]
        return Trial(
            group=self.condition,
            differences=differences,
            ended=frozenset(ended[0] & ended[1]),
            other=None if len(differences) > 1 else self._other_interval(),
            void=self._void,
        )

    @property
    def _void(self) -> frozenset[int]:
        """Seeds whose losses may not be compared: they are confounded, or a run diverged."""
        found = {
            run.config.seed
            for side in (self.arm, self.baseline)
            for run in side.runs
            if run.state == DIVERGED
        }
        for a, b in self.met:
            if any(loss_confounds(a, b, self.allowed, self.paired)):
                found |= {a.config.seed, b.config.seed}
        return frozenset(found)

    def _other_interval(self) -> Interval | None:
        """The interval of arms without two pairs: unpaired, or from the noise of one of the recipes."""
        ours, theirs = self.arm.losses, self.baseline.losses
        if min(len(ours), len(theirs)) > 1:
            return statistics.unpaired_interval(ours, theirs)
        if not ours or not theirs:
            return None
        known = [
            noise_of(self.arm.finished) or noise_floor(self.arm.finished[0], self.cache),
            self.known_noise,
        ]
        # Where the noise of one recipe alone is known, the other is taken to be as noisy.
        noises = [noise for noise in known if noise]
        if not noises:
            return None
        return statistics.single_interval(
            float(np.mean(ours)) - float(np.mean(theirs)),
            [
                (n.standard_deviation, n.seeds)
                for n in (known[0] or noises[0], known[1] or noises[0])
            ],
            (len(ours), len(theirs)),
            shared=len(noises) == 1,
        )
