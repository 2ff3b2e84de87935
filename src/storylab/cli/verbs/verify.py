"""``storylab verify``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from storylab.cli.arguments import DEFAULT_RUNS_DIR, AsJson, require_runs_folder
from storylab.cli.documents import print_document
from storylab.cli.registry import MORE_MEMORY, Call, Verb
from storylab.documents.verify import DifferenceFound, Unchecked, VerifiedItem, VerifyDocument
from storylab.errors import UserError

if TYPE_CHECKING:
    from storylab.verify.verify import Verified

DIFFERENCES_FOUND = 1


@dataclass(frozen=True)
class VerifyCommand:
    """Recompute from the record what can be recomputed, and name every difference.

    Exits with 1 if there is a difference. Changes nothing.

    Examples: storylab verify runs/a | storylab verify runs/a data/mine --depth files
    | storylab verify --all --data --json
    """

    folders: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN-OR-DATA")
    ] = ()
    """Run folders, or folders of data sets."""
    all: bool = False
    """Every run and every experiment in the folder --runs."""
    runs: Path = DEFAULT_RUNS_DIR
    """Folder that holds the run folders, for --all."""
    data: bool = False
    """Also the data sets of the runs."""
    depth: Literal["record", "files", "weights"] | None = None
    """record: all but checkpoints; files: these too; weights: also evaluate the weights again, for as long
    as `storylab eval`. By default weights, and files with --all."""
    data_dir: Path | None = None
    """New place of the runs' data set, if it has moved."""
    device: str | None = None
    """Device to evaluate on: auto, cpu, cuda or mps; by default the run's own, if this machine has it."""
    json: AsJson = False


def run(call: Call) -> int:
    """Verify runs, data sets and experiments."""
    command = call.parse(VerifyCommand)
    if bool(command.folders) == command.all:
        raise UserError("give run folders or data sets to verify, or --all for every run of --runs")
    if command.json:
        found: list[Verified] = []
        print_document(lambda: _document(command, found))
    else:
        found = []
        for item in _verified(command):
            found.append(item)
            _print(item)
        count = sum(len(item.differences) for item in found)
        print(f"{len(found)} verified at depth {_depth(command)}: {count or 'no'} differences")
    return DIFFERENCES_FOUND if any(item.differences for item in found) else 0


def _depth(command: VerifyCommand) -> Literal["record", "files", "weights"]:
    return command.depth or ("files" if command.all else "weights")


def _verified(command: VerifyCommand) -> Iterator[Verified]:
    from storylab.cli.console import ConsoleReporter
    from storylab.experiments.records import experiment_records
    from storylab.record.index import run_folders
    from storylab.verify.verify import Verifier

    folders, records = list(command.folders), []
    if command.all:
        require_runs_folder(command.runs)
        folders, records = run_folders(command.runs), experiment_records(command.runs)
    with ConsoleReporter() as reporter:
        verifier = Verifier(_depth(command), command.data_dir, command.device, reporter.progress)
        yield from verifier(folders, records, command.data)


def _print(item: Verified) -> None:
    from storylab.cli.tables import print_lines

    count = len(item.differences)
    words = f"{count} differences" if count > 1 else f"{count or 'no'} difference"
    print_lines(f"{item.path}: {len(item.checks)} checks, {words}")
    for check, difference in item.differences:
        print_lines(f"  DIFFERS ({check}): {difference.message}")
    for check, gap in item.gaps:
        print_lines(f"  not checked ({check}): {gap.reason}")


def _document(command: VerifyCommand, found: list[Verified]) -> VerifyDocument:
    found += _verified(command)
    return VerifyDocument(
        depth=_depth(command),
        verified=[
            VerifiedItem(
                path=str(item.path),
                kind=item.kind,
                checks=list(item.checks),
                differences=[
                    DifferenceFound(check=check, file=found.file, message=found.message)
                    for check, found in item.differences
                ],
                unchecked=[Unchecked(check=check, reason=gap.reason) for check, gap in item.gaps],
            )
            for item in found
        ],
        differences=sum(len(item.differences) for item in found),
    )


VERB = Verb(
    "verify",
    "recompute what a record allows, and name every difference",
    "experiments",
    run,
    VerifyCommand,
    operand="RUN",
    position=11,
    memory_remedy=MORE_MEMORY,
)
