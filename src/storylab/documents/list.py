"""The document of ``storylab list --json``."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from storylab.documents.fields import about


class ListedRun(Struct, frozen=True, kw_only=True):
    """One run folder at a glance; null where a value is not known."""

    name: Annotated[str, about("name of the run's folder")]
    state: Annotated[
        str, about("`finished`, `diverged`, `failed`, `unfinished`, or `damaged` with a `fault`")
    ]
    parameters: Annotated[int | None, about("trained parameters of the model")]
    tokens: Annotated[int | None, about("tokens trained on, repeated ones counted", "tokens")]
    validation_loss_nats_per_token: Annotated[
        float | None,
        about("loss on the whole validation split of a finished run", "nats per token"),
    ]
    tokens_per_second: Annotated[
        float | None, about("speed of the median iteration", "tokens per second")
    ]
    peak_memory_bytes: Annotated[int | None, about("peak memory, evaluations included", "bytes")]
    started: Annotated[str | None, about("time of the start, as ISO 8601 with its offset from UTC")]
    fault: Annotated[str | None, about("why the run is damaged; else null")]


class ListDocument(Struct, frozen=True, kw_only=True, tag_field="schema", tag="storylab.list/1"):
    """The runs in a folder."""

    folder: Annotated[str, about("the folder with the runs, as it was given")]
    runs: Annotated[
        list[ListedRun], about("its runs, filtered and sorted as the flags say; may be empty")
    ]
