"""``storylab compare``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from storylab.cli.arguments import AsJson, ExitByVerdict, RunFolders
from storylab.cli.documents import print_document
from storylab.cli.models import compare_folders, models_document, print_models
from storylab.cli.registry import MORE_MEMORY, Call, Verb
from storylab.documents.compare import ArmNeighbors, CompareDocument
from storylab.errors import UserError
from storylab.imported import is_imported

if TYPE_CHECKING:
    from storylab.experiments.by_hand import GivenRuns
    from storylab.imported.comparison import ComparedModel


@dataclass(frozen=True)
class CompareCommand:
    """Compare runs. Runs that differ only in the seed form one arm; the arm of the first run is the
    baseline. All runs of one registered experiment are judged by its plan; any other choice of runs is
    exploratory.

    With an imported model among them, the models themselves are compared, in bits per byte of the same
    validation stories.

    Examples: storylab compare runs/a runs/b | storylab compare runs/a-s1 runs/a-s2 runs/b-s1 runs/b-s2
    | storylab compare runs/a models/b
    """

    runs: RunFolders
    """Run folders, or folders of imported models; two or more."""
    margin: float | None = None
    """Largest difference in nats that counts as none; setting it tests whether the arms are equivalent."""
    data_dir: Path | None = None
    """Data set whose stories imported models read; by default that of the first run."""
    exit_code: ExitByVerdict = False
    json: AsJson = False


def run(call: Call) -> int:
    """Compare runs."""
    command = call.parse(CompareCommand)
    if command.margin is not None and not 0 < command.margin < float("inf"):
        raise UserError(f"margin is {command.margin}: it must be a finite number above 0")
    _require_distinct(command.runs)
    if any(map(is_imported, command.runs)):
        return _compare_models(command)
    if command.data_dir is not None:
        raise UserError("--data_dir is for imported models: runs have losses on record")
    from storylab.experiments.comparison import exit_code

    found, faults = _compared(command)
    if command.json:
        print_document(lambda: _document(command, found, faults))
    else:
        _print(found)
    if faults:
        raise UserError(f"left out: {'; '.join(faults)}")
    return exit_code(found.verdicts) if command.exit_code else 0


def _compare_models(command: CompareCommand) -> int:
    """Compare models, of which one at least is imported."""
    if command.margin is not None or command.exit_code:
        raise UserError(
            "--margin and --exit_code are for verdicts about recipes, and an imported model has none: "
            "leave them out"
        )

    def compared() -> list[ComparedModel]:
        return compare_folders(command.runs, command.data_dir)

    if command.json:
        print_document(lambda: models_document(command.runs, compared()))
    else:
        print_models(compared())
    return 0


def _compared(command: CompareCommand) -> tuple[GivenRuns, list[str]]:
    """The runs, compared, and the faults of those that cannot be read.

    Raises:
        UserError: the first run or all others cannot be read, or the runs differ in their seeds alone.
    """
    from storylab.experiments.by_hand import compare_given
    from storylab.experiments.records import FolderCache

    # Without the first there is no baseline.
    cache = FolderCache()
    results, faults = [cache.load(command.runs[0])], []
    for folder in command.runs[1:]:
        try:
            results.append(cache.load(folder))
        except UserError as error:
            faults.append(str(error))
    if len(results) < 2:
        raise UserError("; ".join(faults))
    found = compare_given(results, command.margin, cache)
    if not found.comparisons:
        raise UserError(
            "; ".join(faults)
            or "these runs differ in their seeds alone: that is noise, not a comparison; see "
            f"`storylab noise {command.runs[0]}`"
        )
    return found, faults


def _print(found: GivenRuns) -> None:
    from storylab.cli.tables import print_lines
    from storylab.experiments.effect_words import effect_line
    from storylab.experiments.verdicts import detail_lines, verdict_line

    if found.experiment:
        print_lines(f"All runs of {found.experiment}, judged by its registered plan")
    for effect in found.effects:
        print_lines(effect_line(effect))
    for comparison in found.comparisons:
        print_lines(verdict_line(comparison))
        for line in detail_lines(comparison):
            print_lines(f"  {line}")
    for problem in found.problems:
        print_lines(f"not in the comparison: {problem}")


def _document(command: CompareCommand, found: GivenRuns, faults: list[str]) -> CompareDocument:
    from storylab.experiments.comparison import exit_code
    from storylab.experiments.comparison_document import compared_arm, estimated_effect

    return CompareDocument(
        runs=list(map(str, command.runs)),
        experiment=found.experiment or None,
        comparisons=list(map(compared_arm, found.comparisons)),
        effects=list(map(estimated_effect, found.effects)),
        exit_code=exit_code(found.verdicts),
        neighbors=[
            ArmNeighbors(
                arm=near.arm,
                given_seeds=len(near.given),
                all_seeds=len(near.given) + len(near.others),
                other_seeds=list(map(str, near.others.values())),
                repeats=list(map(str, near.repeats)),
                other_code=list(map(str, near.other_code)),
            )
            for near in found.neighbors
            if near.found
        ],
        left_out=[*faults, *found.problems],
    )


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
    CompareCommand,
    position=6,
    memory_remedy=MORE_MEMORY,
)
