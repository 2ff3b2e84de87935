"""The document of ``storylab eval --json``."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from storylab.documents.fields import about


class TaskEntry(Struct, frozen=True, kw_only=True):
    """A metric of a task."""

    task: Annotated[str, about("`last_word` or `endings`")]
    metric: Annotated[
        str,
        about(
            "`accuracy`: share of right answers by whole log-likelihoods; `accuracy_per_byte`: by "
            "log-likelihoods divided by the bytes of each answer"
        ),
    ]
    value: Annotated[float, about("mean over the items")]
    standard_error: Annotated[
        float | None, about("standard error of `value` over items; null for one item")
    ]
    chance: Annotated[
        float,
        about(
            "accuracy of guessing: 0.25 for `endings`, that of the commonest word for `last_word`"
        ),
    ]
    items: Annotated[int, about("questions")]


class TextEntry(Struct, frozen=True, kw_only=True):
    """Measures of some stories."""

    stories: Annotated[int, about("stories that were measured")]
    tokens: Annotated[int, about("their tokens, without ends of text", "tokens")]
    distinct_1: Annotated[float | None, about("different tokens over all tokens; null for none")]
    distinct_2: Annotated[float | None, about("the same of runs of two tokens within a story")]
    distinct_3: Annotated[float | None, about("the same of runs of three tokens")]
    copied_tokens: Annotated[
        float,
        about("mean over stories of the longest span that training stories have too", "tokens"),
    ]
    longest_copied_tokens: Annotated[int, about("the longest of these spans", "tokens")]
    longest_copied_text: Annotated[str, about("its text")]


class SamplesEntry(Struct, frozen=True, kw_only=True):
    """Stories that the model wrote, and validation stories for comparison."""

    max_new_tokens: Annotated[int, about("limit on the length of a story", "tokens")]
    temperature: Annotated[float, about("divides the logits before a token is drawn")]
    seed: Annotated[int, about("seed of the draws")]
    ended: Annotated[float, about("share of the model's stories that ended before the limit")]
    written: Annotated[TextEntry, about("the model's stories")]
    held_out: Annotated[
        TextEntry,
        about(
            "as many validation stories, their first tokens up to the limit, if there are as many"
        ),
    ]


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
    tasks: Annotated[
        list[TaskEntry],
        about("results of `--tasks`, on questions made from validation stories; may be empty"),
    ] = []
    samples: Annotated[
        SamplesEntry | None, about("measures of `--samples`; null if none were asked for")
    ] = None
