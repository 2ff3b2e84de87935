"""Find everything but the factor in which two runs differ, and facts that a reader should know."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from storylab.experiments.comparison import Arm
from storylab.experiments.factors import (
    WEIGHT_FIELDS,
    changed_fields,
    unexplained,
)
from storylab.record.run import Run

# Mean and median speed further apart than this show that the machine did other work.
SPEED_SPREAD_WARNING = 0.05


def loss_confounds(a: Run, b: Run, allowed: frozenset[str], paired: bool) -> Iterable[str]:
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
    windows = [run.validation.block_size or run.config.block_size for run in (a, b)]
    if windows[0] != windows[1]:
        yield f"evaluation: windows of {windows[0]:,} tokens against {windows[1]:,}"
    same_weights = not WEIGHT_FIELDS & set(changed)
    ours, theirs = a.environment, b.environment
    if paired and same_weights and ours.initial_weights_sha256 != theirs.initial_weights_sha256:
        yield "initial weights: other hashes for the same seed"
    same_batch = a.config.block_size == b.config.block_size
    same_batch &= a.config.tokens_per_iteration == b.config.tokens_per_iteration
    if paired and same_batch and ours.first_batch_sha256 != theirs.first_batch_sha256:
        yield "data order: other first batches for the same seed"
    yield from _processes(a, b)
    versions = a.code_versions | b.code_versions
    if len(versions) > 1:
        yield f"code: {len(versions)} versions ({', '.join(sorted(v[:8] for v in versions))})"
    for package in ("torch", "numpy"):
        yield from _differences(
            package, *({getattr(stage.packages, package) for stage in run.stages} for run in (a, b))
        )


def _processes(a: Run, b: Run) -> Iterable[str]:
    """The numbers of processes, and how they shared a run: these decide the order of additions, and the
    speed."""
    yield from _differences(
        "world_size", *({stage.world_size for stage in run.stages} for run in (a, b))
    )
    yield from _differences(
        "parallel",
        *({stage.parallel for stage in run.stages if stage.world_size > 1} for run in (a, b)),
    )


def speed_confounds(a: Run, b: Run) -> Iterable[str]:
    """Everything but the factor that can move two runs' speed, memory and energy."""
    for key in ("processor", "cpu", "cores", "threads"):
        yield from _differences(
            key, *({getattr(stage, key) for stage in run.stages} for run in (a, b))
        )
    yield from _processes(a, b)
    for key in ("gpu", "device"):  # recorded at the start only, as a resumed run keeps its device
        yield from _differences(key, *({getattr(run.environment, key)} for run in (a, b)))
    yield from _differences(
        "platform", *({stage.platform for stage in run.stages} for run in (a, b))
    )
    if any(stage.shared_machine for run in (a, b) for stage in run.stages):
        yield "shared machine: other runs may have used it at the same time"
    if any(run.results.emulated for run in (a, b)):
        yield "emulated precision, whose time and memory are no measure of hardware"
    if a.config.block_size == b.config.block_size and a.config.batch_size != b.config.batch_size:
        yield f"micro-batch: {a.config.batch_size} against {b.config.batch_size} sequences"


def _differences(name: str, ours: set[Any], theirs: set[Any]) -> Iterable[str]:
    if len(ours | theirs) > 1:
        a, b = (" and ".join(sorted(map(str, values))) for values in (ours, theirs))
        yield f"{name}: {a} against {b}"


def comparison_notes(arm: Arm, baseline: Arm) -> Iterable[str]:
    """Facts for the reader that do not make the comparison void."""
    for side in (arm, baseline):
        resumed = sum(bool(run.environment.resumed) for run in side.runs)
        if resumed:
            yield f"{resumed} of {len(side.runs)} runs of {side.name} were resumed"
    yield from recovery_notes((arm, baseline))
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


def recovery_notes(arms: Iterable[Arm], seeds: Collection[int] | None = None) -> Iterable[str]:
    """The arms with runs that would have diverged without their ``on_divergence``.

    Args:
        arms: whose runs are compared.
        seeds: those that count; all, if None.
    """
    for side in arms:
        found = [
            run.results
            for run in side.finished
            if run.recoveries and (seeds is None or run.config.seed in seeds)
        ]
        if found:
            skipped = sum(summary.skipped_steps for summary in found)
            rewinds = sum(len(summary.rewinds) for summary in found)
            did = [f"skipped {skipped} steps"] * (skipped > 0) + [f"rewound {rewinds} times"] * (
                rewinds > 0
            )
            yield (
                f"{len(found)} of {len(side.runs)} runs of {side.name} would have diverged: they "
                f"{' and '.join(did)}"
            )


def _unsteady(run: Run) -> bool:
    mean = run.results.tokens_per_second
    return run.speed is not None and abs(run.speed / mean - 1) > SPEED_SPREAD_WARNING
