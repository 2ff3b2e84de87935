"""Sampling from a model with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from storylab.config import check_seed
from storylab.errors import UserError
from storylab.model.decoding import RereadingReader, reader_of
from storylab.model.language_model import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Draw among this many most likely tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities sum to at least this (nucleus sampling)."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}: it must be 0 or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        check_seed("seed", self.seed)


def next_token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities ``[B, V]`` float32 that tokens are drawn with, from ``logits [B, V]``.

    Top-k is applied first, then top-p (Holtzman et al. 2020, arXiv 1904.09751) to the remaining tokens.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(1, best, 1.0)
    # Within the range of a float32; at its smallest value, only the greatest logit has a chance.
    bounds = torch.finfo(torch.float32)
    temperature = min(max(sampling.temperature, bounds.tiny), bounds.max)
    # Relative to the greatest, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if 0 < sampling.top_k < logits.shape[1]:
        floor = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token stays if those before it do not reach top_p yet; the first always does.
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= max(sampling.top_p, bounds.tiny), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, ordered)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def generate(
    model: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    context: int,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the next token of every row, ``[B]`` int64 on the CPU, ``max_new_tokens`` times.

    When ``context`` tokens are full, the model continues from the later half of them.

    Args:
        model: in evaluation use; called under the caller's autocast.
        prompt: ``[B, T]`` int64 with T of at least 1.
        max_new_tokens: number of tokens to yield.
        sampling: how tokens are drawn.
        context: greatest number of tokens that the model reads at once, as in training.
        use_cache: False computes every position again for each token: slow, for reference.

    Raises:
        UserError: the logits are not finite.
    """
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    # The longest history that leaves room for one more token.
    unread = seen = prompt[:, -max(1, context - 1) :].to(device)
    reader = reader_of(model, len(prompt), context) if use_cache else RereadingReader(model)
    for _ in range(max_new_tokens):
        with torch.no_grad():  # not around the yield, where the caller's code runs
            logits = reader.read(unread)
        token = _draw(logits.cpu(), sampling, generator)
        yield token[:, 0]
        unread = token.to(device)
        seen = torch.cat((seen, unread), dim=1)
        if seen.shape[1] > context:
            seen = seen[:, -max(1, context // 2) :]
            reader.restart()
            unread = seen


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token ``[B, 1]`` int64 of ``logits [B, V]``, all on the CPU, so that a seed gives the same
    story on every device.

    Raises:
        UserError: the logits are not finite.
    """
    probabilities = next_token_probabilities(logits, sampling)
    if not torch.isfinite(probabilities).all():
        raise UserError("the model's logits are not finite: its weights are of no use")
    return torch.multinomial(probabilities, 1, generator=generator)
