"""A trained model with its tokenizer: text in, stories out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from storylab.data.tokenizer import Tokenizer
from storylab.errors import UserError
from storylab.model.generate import Sampling, generate
from storylab.model.transformer import Transformer
from storylab.training import checkpoint
from storylab.training.precision import Precision, choose_device, high_precision
from storylab.training.run_folder import Run

DEFAULT_TOKENS = 256


@dataclass(frozen=True)
class StoryModel:
    """A model that writes stories; ``block_size`` is the length it was trained on."""

    model: Transformer
    tokenizer: Tokenizer
    block_size: int
    precision: Precision

    def stream(
        self,
        prompt: str,
        sampling: Sampling | None = None,
        max_new_tokens: int = DEFAULT_TOKENS,
        count: int = 1,
    ) -> Iterator[list[bytes]]:
        """Yield the next bytes of each of ``count`` continuations of ``prompt``, batched.

        A continuation that has reached its end of text yields ``b""``; the stream ends when all
        have, or after ``max_new_tokens``.
        """
        if count < 1 or max_new_tokens < 1:
            raise UserError("the number of samples and of tokens must be at least 1")
        return self._stream(prompt, sampling or Sampling(), max_new_tokens, count)

    def _stream(
        self, prompt: str, sampling: Sampling, max_new_tokens: int, count: int
    ) -> Iterator[list[bytes]]:
        end = self.tokenizer.end_of_text
        # An end of text comes before every story in training, so it tells that one begins.
        ids = torch.tensor([[end, *self.tokenizer.encode(prompt)]]).expand(count, -1)
        finished = torch.zeros(count, dtype=torch.bool)
        tokens = generate(self.model, ids, max_new_tokens, sampling, self.block_size)
        while True:
            with self.precision.autocast():  # around the computing, not around the yield
                column = next(tokens, None)
            if column is None:
                return
            finished |= column == end
            if finished.all():
                return
            yield [
                b"" if done else self.tokenizer.decode_bytes([int(token)])
                for token, done in zip(column, finished, strict=True)
            ]

    def sample(
        self,
        prompt: str,
        sampling: Sampling | None = None,
        max_new_tokens: int = DEFAULT_TOKENS,
        count: int = 1,
    ) -> list[str]:
        """``count`` stories that begin with ``prompt``, each at most ``max_new_tokens`` longer."""
        pieces = list(self.stream(prompt, sampling, max_new_tokens, count))
        return [
            prompt + b"".join(piece[i] for piece in pieces).decode("utf-8", "replace")
            for i in range(count)
        ]


def load_story_model(run: Run, name: str = "last", device: str = "auto") -> StoryModel:
    """The model of a run with the weights of checkpoint ``name``.

    Raises:
        UserError: the checkpoint is missing or altered, or there is no such device.
    """
    config = run.config
    precision = high_precision(choose_device(device), config.dtype)
    tokenizer = run.tokenizer
    tensors, _ = checkpoint.load(run.checkpoint(name))
    model = Transformer(config.model, tokenizer.vocab_size)
    checkpoint.load_weights(model, tensors)
    return StoryModel(model.to(precision.device), tokenizer, config.block_size, precision)
