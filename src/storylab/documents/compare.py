"""The document of ``storylab compare --json``."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from storylab.documents.compared import ComparedArm
from storylab.documents.experiment import EstimatedEffect
from storylab.documents.fields import about


class ArmNeighbors(Struct, frozen=True, kw_only=True):
    """Runs of an arm's recipe in the folders of the given runs that were not given."""

    arm: Annotated[str, about("name of the arm")]
    given_seeds: Annotated[int, about("seeds that were given")]
    all_seeds: Annotated[int, about("seeds that were given or found")]
    other_seeds: Annotated[list[str], about("runs of other seeds, by the same code")]
    repeats: Annotated[
        list[str], about("runs of the same seeds, and runs that were set aside; not counted")
    ]
    other_code: Annotated[list[str], about("runs by other versions of the code; not counted")]


class CompareDocument(
    Struct, frozen=True, kw_only=True, tag_field="schema", tag="storylab.compare/1"
):
    """Arms compared with the arm of the first run."""

    runs: Annotated[list[str], about("the run folders, as they were given")]
    experiment: Annotated[
        str | None,
        about(
            "name of the experiment whose runs were given and whose plan judges them; null: the runs "
            "were chosen by hand"
        ),
    ]
    comparisons: Annotated[list[ComparedArm], about("one for every arm but the baseline")]
    effects: Annotated[
        list[EstimatedEffect],
        about("those of a factorial experiment, which are its verdicts; else empty"),
    ]
    exit_code: Annotated[
        int,
        about("code of all verdicts with `--exit_code`; of main effects in a factorial experiment"),
    ]
    neighbors: Annotated[list[ArmNeighbors], about("arms of which other runs were found")]
    left_out: Annotated[list[str], about("faults of runs that could not be read, one line each")]
