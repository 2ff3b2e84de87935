"""Log-likelihoods of continuations under a model, in batches of windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from storylab.training.evaluation import EVAL_BATCH, Tick
from storylab.training.sampling import StoryModel

Ids = Sequence[int]
# Windows of a batch are padded to a multiple of this, as a GPU's attention compiles for each length.
LENGTH_MULTIPLE = 64
# Positions whose logits are in memory at once: 103 MB in float32 with 50,257 words.
POSITIONS = 512


@dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    Attributes:
        log_likelihood: sum over its tokens, in nats.
        greedy: whether each of its tokens is the most likely one.
    """

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class _Window:
    """Tokens of a pair, of which the last ``scored`` are predicted from all before them."""

    pair: int
    ids: Ids
    scored: int


def score_continuations(
    model: StoryModel,
    pairs: Sequence[tuple[Ids, Ids]],
    tick: Tick = lambda done, total: None,
) -> list[Score]:
    """Score the second part of each pair after the first.

    A token is predicted from at most ``block_size`` tokens before it, the length that the model was trained
    on. A continuation that is longer is read in several windows, the last one reaching back to be whole.

    Args:
        model: a model with its precision.
        pairs: ids of a context, of at least one token, and of its continuation.
        tick: called before every batch with the windows done and all of them.
    """
    windows = [w for i, pair in enumerate(pairs) for w in _windows(i, *pair, model.block_size)]
    windows.sort(key=lambda window: len(window.ids), reverse=True)  # so that little is padded
    sums, misses = [0.0] * len(pairs), [0] * len(pairs)
    for first in range(0, len(windows), EVAL_BATCH):
        tick(first, len(windows))
        batch = windows[first : first + EVAL_BATCH]
        likelihoods, wrong = _score(model, batch)
        for window, likelihood, count in zip(batch, likelihoods, wrong, strict=True):
            sums[window.pair] += likelihood
            misses[window.pair] += count
    return [Score(total, count == 0) for total, count in zip(sums, misses, strict=True)]


def _windows(pair: int, context: Ids, continuation: Ids, block_size: int) -> Iterator[_Window]:
    ids = [*context, *continuation]
    for first in range(len(context), len(ids), block_size):
        stop = min(first + block_size, len(ids))
        yield _Window(pair, ids[max(0, stop - block_size - 1) : stop], stop - first)


def _score(model: StoryModel, windows: Sequence[_Window]) -> tuple[list[float], list[int]]:
    """For each window the sum of its log-likelihoods, and the number of tokens that are not the most likely
    ones."""
    longest = max(len(window.ids) for window in windows) - 1
    width = min(model.block_size, -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    tokens = torch.zeros(len(windows), width + 1, dtype=torch.int64)
    scored = torch.zeros(len(windows), width, dtype=torch.bool)
    for row, window in enumerate(windows):
        stop = len(window.ids)
        tokens[row, :stop] = torch.tensor(window.ids)
        scored[row, stop - 1 - window.scored : stop - 1] = True
    device = model.precision.device
    tokens, scored = tokens.to(device), scored.to(device)
    with torch.no_grad(), model.precision.autocast():
        hidden = model.model.hidden_states(tokens[:, :-1])[scored]
        likelihoods, right = _token_scores(model, hidden, tokens[:, 1:][scored])
    counts = [window.scored for window in windows]
    return (
        [float(part.sum(dtype=torch.float64)) for part in likelihoods.cpu().split(counts)],
        [int((~part).sum()) for part in right.cpu().split(counts)],
    )


def _token_scores(model: StoryModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood of ``targets [N]`` after the states ``hidden [N, C]``, ``[N]`` float32, and whether
    each is the most likely token."""
    likelihoods, right = [], []
    for states, wanted in zip(hidden.split(POSITIONS), targets.split(POSITIONS), strict=True):
        logits = model.model.logits(states).float()
        likelihoods.append(logits.log_softmax(-1).gather(1, wanted.unsqueeze(1)).squeeze(1))
        right.append(logits.argmax(-1) == wanted)
    return torch.cat(likelihoods), torch.cat(right)
