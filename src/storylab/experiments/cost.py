"""The cost of runs: hours of CPU cores and of GPUs, and energy where it was measured."""

from __future__ import annotations

from collections.abc import Sequence

from storylab.record.run import Run


def cost_words(runs: Sequence[Run]) -> str:
    """The cost of runs that have ended, such as ``1.5 core-hours, 20 kJ in 3 of 4 runs``.

    A run on a CPU takes a core for each thread of each process, for all of its seconds. A run on a GPU
    takes a GPU for each process.
    """
    hours = {"core-hours": 0.0, "GPU-hours": 0.0}
    for run in runs:
        environment, seconds = run.environment, run.results.seconds
        if environment.gpu is None:
            hours["core-hours"] += seconds * environment.threads * environment.world_size / 3600
        else:
            hours["GPU-hours"] += seconds * environment.world_size / 3600
    parts = [f"{_rounded(value)} {unit}" for unit, value in hours.items() if value]
    energies = [run.results.energy_joules for run in runs]
    known = [joules for joules in energies if joules is not None]
    if known:
        some = "" if len(known) == len(runs) else f" in {len(known)} of {len(runs)} runs"
        parts.append(f"{_rounded(sum(known) / 1000)} kJ{some}")
    return ", ".join(parts)


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
