"""Stories that a model writes, and measures of them that need nobody to read them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from storylab.config import at_most
from storylab.data.dataset import Dataset
from storylab.data.layout import TRAIN, VALIDATION
from storylab.data.tokenizer import Tokenizer
from storylab.errors import UserError
from storylab.model.generate import Sampling
from storylab.quality import MOST_SAMPLES
from storylab.quality.copying import Span, longest_copies
from storylab.training.evaluation import Tick
from storylab.training.sampling import StoryModel, TextTokenizer

# Stories that are written in one batch. The draws depend on it.
AT_ONCE = 64
N_GRAMS = (1, 2, 3)


@dataclass(frozen=True)
class Samples:
    """Stories as ids without their end of text.

    Attributes:
        stories: ids, ``[n]`` int64 each.
        ended: share that ended before the limit on their length.
    """

    stories: list[np.ndarray]
    ended: float


@dataclass(frozen=True)
class TextMeasures:
    """Measures of some stories.

    Attributes:
        stories: number of stories.
        tokens: number of their tokens.
        distinct: the shares of different n-grams among those of 1, 2 and 3 tokens; see :func:`distinct_n`.
        copied_tokens: mean over stories of the longest span that the training stories have too.
        longest_copied_tokens: the longest of these spans.
        longest_copied_text: its text.
    """

    stories: int
    tokens: int
    distinct: tuple[float, ...]
    copied_tokens: float
    longest_copied_tokens: int
    longest_copied_text: str


def write_samples(
    model: StoryModel,
    count: int,
    max_new_tokens: int,
    sampling: Sampling,
    tick: Tick = lambda done, total: None,
) -> Samples:
    """Have a model write ``count`` stories from their beginning, each of at most ``max_new_tokens``.

    Raises:
        UserError: a number is out of range.
    """
    if count < 1 or max_new_tokens < 1:
        raise UserError("the number of samples and of tokens must be at least 1")
    at_most(MOST_SAMPLES, "samples", count)
    end = model.tokenizer.end_of_text
    stories, ended = [], 0
    for first in range(0, count, AT_ONCE):
        tick(first, count)
        drawn = dataclasses.replace(sampling, seed=sampling.seed + first // AT_ONCE)
        columns = list(model.ids("", drawn, max_new_tokens, min(AT_ONCE, count - first)))
        for row in torch.stack(columns, dim=1).numpy():
            ends = np.flatnonzero(row == end)
            ended += len(ends) > 0
            stories.append(row[: ends[0]] if len(ends) else row)
    return Samples(stories, ended / count)


def in_ids_of(
    tokenizer: Tokenizer, stories: Sequence[np.ndarray], theirs: TextTokenizer
) -> list[np.ndarray]:
    """Stories in the ids of the tokenizer ``theirs``, encoded again if ``tokenizer`` is another one."""
    if theirs == tokenizer:
        return list(stories)
    texts = [theirs.decode_bytes(ids.tolist()).decode("utf-8", "replace") for ids in stories]
    # SentencePiece puts a space before a text.
    return [np.array(tokenizer.encode(text.removeprefix(" ")), dtype=np.int64) for text in texts]


def held_out_sample(dataset: Dataset, count: int, most: int) -> list[np.ndarray]:
    """The first ``most`` tokens of ``count`` validation stories, spread evenly, or of all if there are
    fewer: ``[<= most]`` int64 each."""
    split = dataset.splits[VALIDATION]
    borders = split.stories[:, 0]
    chosen = np.unique(np.linspace(0, len(borders) - 2, min(count, len(borders) - 1)).astype(int))
    return [
        split.read(borders[i], min(borders[i] + most, borders[i + 1] - 1)) for i in chosen.tolist()
    ]


def distinct_n(stories: Sequence[np.ndarray], n: int) -> float:
    """Distinct-n (Li et al. 2016, arXiv 1510.03055): the share of different n-grams among all n-grams of
    ``n`` tokens within stories; NaN for none.

    It falls as the stories grow in number, so only compare equal numbers.
    """
    ids = [story.tolist() for story in stories]
    grams = [tuple(story[i : i + n]) for story in ids for i in range(len(story) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def measure(
    groups: Sequence[Sequence[np.ndarray]],
    dataset: Dataset,
    tick: Tick = lambda done, total: None,
) -> list[TextMeasures]:
    """Measure each group of stories, and search the training stories of ``dataset`` for their spans, once.

    Args:
        groups: ids of stories without an end of text; at least one story in each.
        dataset: the data that the model was trained on.
        tick: called during the search with the tokens read and all of them.
    """
    stories = [story for group in groups for story in group]
    spans = iter(longest_copies(stories, dataset.splits[TRAIN], dataset.vocab_size, tick))
    return [_measures(group, list(islice(spans, len(group))), dataset) for group in groups]


def _measures(
    stories: Sequence[np.ndarray], spans: Sequence[Span], dataset: Dataset
) -> TextMeasures:
    longest = max(range(len(spans)), key=lambda i: spans[i].length)
    span = spans[longest]
    ids = stories[longest][span.start : span.start + span.length]
    return TextMeasures(
        stories=len(stories),
        tokens=sum(map(len, stories)),
        distinct=tuple(distinct_n(stories, n) for n in N_GRAMS),
        copied_tokens=sum(span.length for span in spans) / len(spans),
        longest_copied_tokens=span.length,
        longest_copied_text=dataset.tokenizer.decode(ids.tolist()),
    )
