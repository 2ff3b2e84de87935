"""``storylab compare``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from storylab.cli.arguments import RunFolders
from storylab.cli.registry import MORE_MEMORY, Call, Verb
from storylab.errors import UserError


@dataclass(frozen=True)
class CompareCommand:
    """Compare runs. Runs that differ only in the seed form one arm; the arm of the first run is the
    baseline.

    Examples: storylab compare runs/a runs/b | storylab compare runs/a-s1 runs/a-s2 runs/b-s1 runs/b-s2
    """

    runs: RunFolders
    """Run folders, two or more."""
    margin: float | None = None
    """Largest difference in nats that counts as none; setting it tests whether the arms are equivalent."""


def run(call: Call) -> int:
    """Compare runs."""
    command = call.parse(CompareCommand)
    if command.margin is not None and not 0 < command.margin < float("inf"):
        raise UserError(f"margin is {command.margin}: it must be a finite number above 0")
    _require_distinct(command.runs)
    from storylab.experiments.compare import compare_runs
    from storylab.experiments.verdicts import detail_lines, verdict_line
    from storylab.record.run import load_run

    # Without the first there is no baseline.
    results, faults = [load_run(command.runs[0])], []
    for folder in command.runs[1:]:
        try:
            results.append(load_run(folder))
        except UserError as error:
            faults.append(str(error))
    if len(results) < 2:
        raise UserError("; ".join(faults))
    comparisons = compare_runs(results, command.margin)
    if not comparisons:
        raise UserError(
            "these runs differ in their seeds alone: that is noise, not a comparison; see "
            f"`storylab noise {command.runs[0]}`"
        )
    for comparison in comparisons:
        print(verdict_line(comparison))
        for line in detail_lines(comparison):
            print(f"  {line}")
    if faults:
        raise UserError(f"left out: {'; '.join(faults)}")
    return 0


def _require_distinct(runs: tuple[Path, ...]) -> None:
    """Raise a UserError unless there are two folders or more, all different."""
    folders = [Path(os.path.realpath(folder)) for folder in runs]
    for folder, resolved in zip(runs, folders, strict=True):
        if folders.count(resolved) > 1:
            raise UserError(f"{folder} is given twice: a run counts once")
    if len(folders) < 2:
        raise UserError("give two runs or more: storylab compare RUN RUN...")


VERB = Verb(
    "compare",
    "compare runs: which is better, by how much, and whether the comparison is fair",
    "experiments",
    run,
    position=6,
    memory_remedy=MORE_MEMORY,
)
