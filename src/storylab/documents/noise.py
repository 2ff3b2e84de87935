"""The document of ``storylab noise --json``."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from storylab.documents.fields import about


class Detectable(Struct, frozen=True, kw_only=True):
    """The smallest difference that a number of pairs could see."""

    pairs: Annotated[int, about("pairs of runs with the same seed")]
    difference_nats_per_token: Annotated[
        float | None,
        about("the smallest difference of loss that so many pairs could see", "nats per token"),
    ]


class NoiseFloor(Struct, frozen=True, kw_only=True):
    """The spread of the final loss over the seeds of one recipe."""

    condition: Annotated[str | None, about("the condition of the experiment; null without one")]
    run: Annotated[str, about("the folder of one of the runs")]
    preset: Annotated[str, about("the named shape of the model")]
    tokens: Annotated[int, about("tokens that a run trains on", "tokens")]
    seeds: Annotated[int, about("seeds that have finished")]
    standard_deviation_nats_per_token: Annotated[
        float, about("of the loss on the whole validation split", "nats per token")
    ]
    low_nats_per_token: Annotated[
        float, about("lower end of the interval of the standard deviation", "nats per token")
    ]
    high_nats_per_token: Annotated[float, about("its upper end", "nats per token")]
    level: Annotated[float, about("confidence of the interval, such as 0.95")]
    like_recipes: Annotated[
        int, about("recipes in the folder that differ in one factor and share three seeds or more")
    ]
    paired_standard_deviation_nats_per_token: Annotated[
        float,
        about(
            "of a paired difference: the median over like recipes, each corrected to be too large as "
            "often as too small; without any, an upper bound from the noise of this recipe",
            "nats per token",
        ),
    ]
    detectable: Annotated[list[Detectable], about("the power of a few numbers of pairs")]
    left_out: Annotated[list[str], about("faults of runs that could not be read, one line each")]


class NoiseDocument(Struct, frozen=True, kw_only=True, tag_field="schema", tag="storylab.noise/1"):
    """How much the loss changes with the seed alone."""

    floors: Annotated[
        list[NoiseFloor], about("one for a run; one for every condition of an experiment")
    ]
