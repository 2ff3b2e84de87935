"""Losses of an imported model on the stories of a data set that our tokenizer encoded.

A loss in nats per token says nothing across tokenizers; bits per byte of the same text do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from storylab.data.dataset import Dataset, Split, token_dtype
from storylab.data.layout import VALIDATION
from storylab.data.tokenizer import Tokenizer
from storylab.errors import UserError
from storylab.imported.folder import ImportedTokenizer
from storylab.training.evaluation import Evaluation, Tick, position_means, window_losses
from storylab.training.sampling import StoryModel

# Tokens in a window, unless the model was made for fewer or another number is asked for: as in our runs.
WINDOW = 512
# Stories that are encoded at once.
BATCH = 1024


@dataclass(frozen=True)
class EncodedStories:
    """Stories in the ids of a model.

    Attributes:
        ids: ``[n]`` int64; every story has the id that begins a story before it and the one that ends it
            after it.
        borders: where each story begins in ``ids``, and where the last one ends, ``[stories + 1]``.
        text_bytes: UTF-8 bytes of the stories.
        lossy: number of stories that do not come back from their ids.
    """

    ids: np.ndarray
    borders: np.ndarray
    text_bytes: int
    lossy: int


def story_texts(split: Split, tokenizer: Tokenizer) -> Iterator[bytes]:
    """UTF-8 text of every story of ``split``."""
    for begin, end in zip(split.stories[:-1, 0], split.stories[1:, 0], strict=True):
        yield tokenizer.decode_bytes(split.read(int(begin), int(end) - 1).tolist())


def encode_stories(texts: Sequence[bytes], tokenizer: ImportedTokenizer) -> EncodedStories:
    """Encode stories, each alone, as the model's tokenizer does."""
    parts: list[np.ndarray] = []
    lossy = 0
    for first in range(0, len(texts), BATCH):
        chosen = texts[first : first + BATCH]
        encoded = tokenizer.encode_stories([text.decode("utf-8", "replace") for text in chosen])
        for text, ids in zip(chosen, encoded, strict=True):
            # SentencePiece puts a space before a text.
            lossy += tokenizer.decode_bytes(ids) not in (text, b" " + text)
            parts.append(np.array([tokenizer.begin_of_text, *ids, tokenizer.end_of_text]))
    borders = np.cumsum([0, *map(len, parts)])
    return EncodedStories(np.concatenate(parts), borders, sum(map(len, texts)), lossy)


def evaluate_stories(
    model: StoryModel, stories: EncodedStories, block_size: int, tick: Tick = lambda *_: None
) -> Evaluation:
    """Loss of every token of every story, and of its end, read from the story alone.

    That is :func:`~storylab.training.evaluation.evaluate_split` with ``aligned``: a new window begins at
    every story, and after every ``block_size`` tokens. The id that begins a story is given, not predicted.
    """
    # Entry i is the loss of token i + 1.
    begins, ends = stories.borders[:-1], stories.borders[1:] - 1
    pieces = [np.arange(*story, block_size) for story in zip(begins, ends, strict=True)]
    counts = np.array([len(piece) for piece in pieces])
    starts, last = np.concatenate(pieces), np.repeat(ends, counts)
    lengths = np.minimum(last - starts, block_size)
    longest = int(lengths.max())
    dtype = token_dtype(int(stories.ids.max()) + 1)
    split = Split("stories", (stories.ids.astype(dtype),), (0, len(stories.ids)), np.empty((0, 2)))
    losses = window_losses(model.model, split, starts, longest, model.precision, tick)
    counted = np.arange(longest) < lengths[:, None]
    windows = losses.sum(axis=1, dtype=np.float64, where=counted)
    sums = np.add.reduceat(windows, np.cumsum([0, *counts[:-1]]))
    positions = np.full(block_size, np.nan)
    positions[:longest] = position_means(losses, lengths)
    return Evaluation(sums, ends - begins, positions, stories.text_bytes)


def evaluate_imported(
    model: StoryModel,
    tokenizer: ImportedTokenizer,
    dataset: Dataset,
    split: str = VALIDATION,
    block_size: int | None = None,
    tick: Tick = lambda *_: None,
) -> tuple[Evaluation, int]:
    """Evaluate an imported model on the stories of a split, each read alone.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        dataset: has the stories, in the ids of our tokenizer.
        split: name of the split.
        block_size: tokens in a window; by default 512, or as many as the model was made for.
        tick: called before every batch.

    Returns:
        The evaluation, and the number of stories that do not come back from the model's tokenizer. Their
        bits are those of another text.

    Raises:
        UserError: the model was not made for windows of that length.
    """
    size = _window(model.block_size, block_size)
    texts = list(story_texts(dataset.splits[split], dataset.tokenizer))
    stories = encode_stories(texts, tokenizer)
    return evaluate_stories(model, stories, size, tick), stories.lossy


def _window(context: int, block_size: int | None) -> int:
    """Tokens in a window.

    Raises:
        UserError: the model was not made for ``block_size`` tokens.
    """
    if block_size is None:
        return min(WINDOW, context)
    if not 1 <= block_size <= context:
        raise UserError(
            f"block_size is {block_size}: the model reads 1 to {context} tokens at once"
        )
    return block_size
