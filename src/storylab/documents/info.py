"""The document of ``storylab info --json``."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from storylab.documents.fields import about


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
