"""A trained model with its tokenizer: text in, stories out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from storylab.data.layout import END_OF_TEXT
from storylab.errors import UserError
from storylab.model.generate import Sampling, generate
from storylab.model.language_model import LanguageModel
from storylab.model.transformer import Transformer
from storylab.record import checkpoint
from storylab.record.folder import RunFolder
from storylab.training.precision import ComputePolicy, choose_device, high_precision

DEFAULT_TOKENS = 256


def as_in_stories(prompt: str) -> str:
    """The prompt as a story would have it: without a space at its end, or an ``<|endoftext|>`` at
    its start.

    A space belongs to the word after it, so models have hardly seen a text that ends with one; and the
    ``<|endoftext|>`` before a story is there without being asked for.
    """
    while prompt.startswith(END_OF_TEXT):
        prompt = prompt.removeprefix(END_OF_TEXT)
    return prompt.rstrip(" ")


class TextTokenizer(Protocol):
    """Ids for text and text for ids."""

    @property
    def begin_of_text(self) -> int:
        """Id before a story."""
        ...

    @property
    def end_of_text(self) -> int:
        """Id after a story."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` at the beginning of a story, without the ids before and after it."""
        ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of ``ids`` within a story."""
        ...


@dataclass(frozen=True)
class StoryModel:
    """A model that writes stories; ``block_size`` is the length it was trained on."""

    model: LanguageModel
    tokenizer: TextTokenizer
    block_size: int
    precision: ComputePolicy

    def stream(
        self,
        prompt: str,
        sampling: Sampling | None = None,
        max_new_tokens: int = DEFAULT_TOKENS,
        count: int = 1,
    ) -> Iterator[list[bytes]]:
        """Yield the next bytes of each of ``count`` continuations of ``prompt``, batched.

        The prompt is read :func:`as_in_stories`; an ``<|endoftext|>`` within it ends one story and begins
        the next.

        A continuation that has reached its end of text yields ``b""``; the stream ends when all
        have, or after ``max_new_tokens``.
        """
        return self._pieces(self.ids(prompt, sampling, max_new_tokens, count))

    def _pieces(self, columns: Iterator[Tensor]) -> Iterator[list[bytes]]:
        end = self.tokenizer.end_of_text
        for column in columns:
            if (column == end).all():
                return
            yield [
                b"" if token == end else self.tokenizer.decode_bytes([token])
                for token in column.tolist()
            ]

    def ids(
        self,
        prompt: str,
        sampling: Sampling | None = None,
        max_new_tokens: int = DEFAULT_TOKENS,
        count: int = 1,
    ) -> Iterator[Tensor]:
        """Yield the next id of each continuation, ``[count]`` int64; see :meth:`stream`.

        A continuation that has reached its end of text repeats it; the last ids are all ends of text if all
        have ended in time.
        """
        if count < 1 or max_new_tokens < 1:
            raise UserError("the number of samples and of tokens must be at least 1")
        return self._ids(prompt, sampling or Sampling(), max_new_tokens, count)

    def _ids(
        self, prompt: str, sampling: Sampling, max_new_tokens: int, count: int
    ) -> Iterator[Tensor]:
        begin, end = self.tokenizer.begin_of_text, self.tokenizer.end_of_text
        ids = [
            token
            for story in as_in_stories(prompt).split(END_OF_TEXT)
            for token in (begin, *self.tokenizer.encode(story))
        ]
        finished = torch.zeros(count, dtype=torch.bool)
        prompts = torch.tensor([ids]).expand(count, -1)
        tokens = generate(self.model, prompts, max_new_tokens, sampling, self.block_size)
        while not finished.all():
            with self.precision.autocast():  # around the computing, not around the yield
                column = next(tokens, None)
            if column is None:
                return
            finished |= column == end
            yield column.masked_fill(finished, end)

    def sample(
        self,
        prompt: str,
        sampling: Sampling | None = None,
        max_new_tokens: int = DEFAULT_TOKENS,
        count: int = 1,
    ) -> list[str]:
        """``count`` stories that begin with ``prompt``, read :func:`as_in_stories`, each at most
        ``max_new_tokens`` longer."""
        pieces = list(self.stream(prompt, sampling, max_new_tokens, count))
        return [
            as_in_stories(prompt)
            + b"".join(piece[i] for piece in pieces).decode("utf-8", "replace")
            for i in range(count)
        ]


def load_story_model(run: RunFolder, name: str = "last", device: str = "auto") -> StoryModel:
    """The model of a run with the weights of checkpoint ``name``.

    Raises:
        UserError: the checkpoint is missing or altered, or there is no such device.
    """
    config = run.read_config()
    precision = high_precision(choose_device(device), config.dtype)
    tokenizer = run.load_tokenizer()
    tensors, _ = checkpoint.load(run.checkpoint(name))
    model = Transformer(config.model, tokenizer.vocab_size)
    checkpoint.load_weights(model, tensors)
    return StoryModel(model.to(precision.device), tokenizer, config.block_size, precision)
