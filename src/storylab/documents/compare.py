"""The document of ``storylab compare --json``."""

from __future__ import annotations

from typing import Annotated

import msgspec
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


class ModelBits(Struct, frozen=True, kw_only=True):
    """A model on the validation stories that all given models read, each story alone."""

    folder: Annotated[str, about("the folder of the run or of the imported model, as it was given")]
    imported: Annotated[bool, about("whether it is an imported model")]
    block_size: Annotated[int, about("tokens in a window", "tokens")]
    bits_per_byte: Annotated[
        float,
        about("bits to code the stories, over the UTF-8 bytes of their text", "bits per byte"),
    ]
    difference_bits_per_byte: Annotated[
        float, about("`bits_per_byte` minus that of the first model", "bits per byte")
    ]
    low_bits_per_byte: Annotated[
        float, about("lower end of the difference's 95 % interval over stories", "bits per byte")
    ]
    high_bits_per_byte: Annotated[float, about("its upper end", "bits per byte")]
    lossy_stories: Annotated[int, about("stories that do not come back from the model's tokenizer")]


class CompareDocument(
    Struct, frozen=True, kw_only=True, tag_field="schema", tag="storylab.compare/1"
):
    """Arms compared with the arm of the first run."""

    runs: Annotated[list[str], about("the folders, as they were given")]
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
    models: Annotated[
        list[ModelBits],
        about(
            "every given folder, if one of them is an imported model; then there are no comparisons"
        ),
    ] = msgspec.field(default_factory=list)
