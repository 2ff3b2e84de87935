"""The document of ``storylab eval --json``."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from storylab.documents.fields import about


class EvalDocument(Struct, frozen=True, kw_only=True, tag_field="schema", tag="storylab.eval/1"):
    """Losses of a run's model on a whole split; null where a value is not finite."""

    run: Annotated[str, about("the folder of the run or of the imported model, as it was given")]
    checkpoint: Annotated[
        str, about("`last` or `best`; `imported`: the weights of an imported model")
    ]
    split: Annotated[str, about("the split whose stories were read")]
    block_size: Annotated[int, about("tokens in a window", "tokens")]
    aligned: Annotated[
        bool, about("whether a new window starts at every story; a loss depends on it")
    ]
    loss_nats_per_token: Annotated[float | None, about("mean cross-entropy", "nats per token")]
    standard_error_nats_per_token: Annotated[
        float | None,
        about("standard error of the loss over stories; null for one story", "nats per token"),
    ]
    perplexity: Annotated[float | None, about("the exponential of the loss")]
    bits_per_byte: Annotated[
        float | None,
        about("bits to code the split, over the UTF-8 bytes of its text", "bits per byte"),
    ]
    stories: Annotated[int, about("stories in the split")]
    tokens: Annotated[int, about("predicted tokens: all but the first", "tokens")]
    text_bytes: Annotated[int, about("UTF-8 bytes of the split's text", "bytes")]
    lossy_stories: Annotated[
        int,
        about("stories that do not come back from the tokenizer of an imported model; 0 for a run"),
    ] = 0
