"""The document of ``storylab info --json``."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from storylab.documents.fields import about


class CheckEntry(Struct, frozen=True, kw_only=True):
    """A check before the first step."""

    name: Annotated[str, about("name of the check")]
    passed: Annotated[bool, about("false where the run went on without compiling")]
    seconds: Annotated[float, about("time that it took", "seconds")]
    finding: Annotated[str, about("its finding in one line")]


class StageEntry(Struct, frozen=True, kw_only=True):
    """The start or a resume of a run."""

    iteration: Annotated[int, about("the iteration that it began with")]
    skipped: Annotated[
        bool | None,
        about("whether --skip_checks was given; null: that version of storylab recorded none"),
    ]
    seconds: Annotated[float | None, about("time of all its checks; null as `skipped`", "seconds")]
    checks: Annotated[list[CheckEntry], about("checks that applied, in order")]


class InfoDocument(Struct, frozen=True, kw_only=True, tag_field="schema", tag="storylab.info/1"):
    """Shape and parameter count of a model."""

    preset: Annotated[str, about("the named shape that the flags start from")]
    model: Annotated[
        dict[str, bool | int | float | str],
        about("every setting of the model, under the name of its flag, as in `config.json`"),
    ]
    head_size: Annotated[int, about("features of an attention head")]
    reach_tokens: Annotated[
        list[int | None],
        about(
            "last positions that a token reads in each layer, first layer to last, its own "
            "included; null: no limit",
            "tokens",
        ),
    ]
    receptive_field_tokens: Annotated[
        int | None,
        about("positions that an output depends on through all layers; null: all", "tokens"),
    ]
    vocab_size: Annotated[int, about("token ids that the parameters are counted with")]
    parameters: Annotated[int, about("trained parameters")]
    run: Annotated[str | None, about("run folder; null if none was given")]
    stages: Annotated[
        list[StageEntry],
        about("start and resumes of the run, each with its checks; empty if none was given"),
    ]
    on_divergence: Annotated[
        str | None, about("the run's choice where loss or gradients are not finite; null: no run")
    ]
    recoveries: Annotated[
        list[str],
        about("steps that the run skipped and rewinds, in words; empty before the run has ended"),
    ]
