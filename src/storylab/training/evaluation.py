"""Loss on fixed windows: a quick estimate during training, the whole split at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from storylab.data.batches import evaluation_windows
from storylab.data.dataset import Dataset, Split
from storylab.data.layout import VALIDATION
from storylab.errors import UserError
from storylab.model.language_model import LanguageModel
from storylab.record.folder import open_run
from storylab.training.precision import ComputePolicy
from storylab.training.ranks import ONE_PROCESS, Ranks
from storylab.training.sampling import StoryModel, load_story_model

Tick = Callable[[int, int], None]
"""Called before every batch with the windows done and all of them; may raise to leave."""

# Windows in one evaluation batch, whatever the training batch size: as in the original log.
EVAL_BATCH = 64


@dataclass(frozen=True)
class Evaluation:
    """Loss of a model on a whole split.

    ``story_losses [n]`` are sums of nats, ``story_tokens [n]`` the predicted tokens of each story,
    its end-of-text token included; the very first token of the split has nothing before it and is
    not predicted. ``position_losses [block_size]`` are mean nats of the targets at each position
    of a window, NaN where no window has one.
    """

    story_losses: np.ndarray
    story_tokens: np.ndarray
    position_losses: np.ndarray
    text_bytes: int

    @property
    def block_size(self) -> int:
        """Tokens in a window: a loss holds for this length."""
        return len(self.position_losses)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return float(self.story_losses.sum() / self.story_tokens.sum())

    @property
    def standard_error(self) -> float:
        """Standard error of :attr:`loss` over stories, the units drawn, not tokens.

        That of a ratio of sums (Cochran 1977, Sampling Techniques, section 6.4); NaN for one story.
        """
        n = len(self.story_losses)
        if n < 2:
            return math.nan
        residuals = self.story_losses - self.loss * self.story_tokens
        spread = math.sqrt(n / (n - 1) * float((residuals**2).sum()))
        return spread / float(self.story_tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp(loss), at most e^700."""
        return math.exp(min(self.loss, 700))

    @property
    def bits_per_byte(self) -> float:
        """Bits to code the split, end-of-text tokens included, over the UTF-8 bytes of its text."""
        return float(self.story_losses.sum()) / math.log(2) / self.text_bytes


def window_losses(
    model: LanguageModel,
    split: Split,
    starts: np.ndarray,
    block_size: int,
    precision: ComputePolicy,
    tick: Tick = lambda done, total: None,
    ranks: Ranks = ONE_PROCESS,
) -> np.ndarray:
    """Loss of every target in the windows at ``starts [W]``, in nats: ``[W, block_size]`` float32.

    Past the end of the split a window is filled with token 0, which nothing before it sees. Every rank
    evaluates a share of the batches and gets all losses.
    """
    losses = np.zeros((len(starts), block_size), dtype=np.float32)
    batches = range(0, len(starts), EVAL_BATCH)
    for first in ranks.turns(batches, lambda first: tick(first, len(starts))):
        chosen = slice(first, first + EVAL_BATCH)
        windows = torch.from_numpy(_padded_windows(split, starts[chosen], block_size + 1))
        windows = windows.to(precision.device)
        with torch.no_grad(), precision.autocast():
            losses[chosen] = model.token_losses(windows[:, :-1], windows[:, 1:]).cpu().numpy()
    # Zeros are added to the losses that another rank has computed, which changes no bit.
    ranks.add(torch.from_numpy(losses))
    return losses


def _padded_windows(split: Split, starts: np.ndarray, length: int) -> np.ndarray:
    windows = np.zeros((len(starts), length), dtype=np.int64)
    for window, start in zip(windows, starts.tolist(), strict=True):
        tokens = split.read(start, start + length)
        window[: len(tokens)] = tokens
    return windows


def estimate_loss(
    model: LanguageModel,
    split: Split,
    block_size: int,
    batches: int,
    precision: ComputePolicy,
    tick: Tick = lambda done, total: None,
    ranks: Ranks = ONE_PROCESS,
) -> float:
    """Mean loss in nats over ``batches`` x 64 windows, the same ones at every call."""
    starts = evaluation_windows(split, block_size, batches * EVAL_BATCH)
    losses = window_losses(model, split, starts, block_size, precision, tick, ranks)
    return float(losses.mean(dtype=np.float64))


def evaluate_split(
    model: LanguageModel,
    split: Split,
    block_size: int,
    precision: ComputePolicy,
    tick: Tick = lambda done, total: None,
    aligned: bool = False,
    ranks: Ranks = ONE_PROCESS,
) -> Evaluation:
    """Loss of every token of ``split`` (but the first), read in windows of ``block_size``.

    Windows follow each other without overlap, so a token is predicted from 1 to ``block_size``
    tokens before it; the last window reaches back to be whole, and only its new tokens count.
    With ``aligned`` a new window begins at every story, with the end-of-text token of the story
    before, so that a token is predicted from its own story alone; tokens of a window past its
    story's end do not count.
    """
    targets = (
        len(split) - 1
    )  # entry i is the loss of token i + 1: story borders move one to the left
    begins = np.maximum(split.stories[:-1, 0] - 1, 0)
    ends = split.stories[1:, 0] - 1
    if aligned:
        pieces = [np.arange(*story, block_size) for story in zip(begins, ends, strict=True)]
        starts = new = np.concatenate(pieces)
    else:
        new = np.arange(0, targets, block_size)
        starts = np.minimum(new, targets - block_size)
    losses = window_losses(model, split, starts, block_size, precision, tick, ranks)
    by_target = np.empty(targets, dtype=np.float32)
    stops = np.append(new[1:], targets)
    for row, start, first, end in zip(losses, starts, new, stops, strict=True):
        by_target[first:end] = row[first - start : end - start]
    sums = np.add.reduceat(by_target, begins, dtype=np.float64)
    positions = position_means(losses, stops - starts)
    return Evaluation(sums, ends - begins, positions, split.text_bytes)


def position_means(losses: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Means over windows of ``losses [W, T]`` of which ``lengths [W]`` count: ``[T]``, NaN for none."""
    counted = np.arange(losses.shape[1]) < lengths[:, None]
    sums, counts = losses.sum(axis=0, dtype=np.float64, where=counted), counted.sum(axis=0)
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def open_evaluation(
    folder: Path,
    checkpoint_name: str = "last",
    data_dir: Path | None = None,
    device: str = "auto",
) -> tuple[StoryModel, Dataset]:
    """The model of a run and its data, to evaluate one on the other.

    Raises:
        UserError: the run, its checkpoint or its data cannot be used.
    """
    run = open_run(folder)
    dataset = run.load_data(data_dir or run.read_config().data_dir)
    return load_story_model(run, checkpoint_name, device), dataset


def evaluate_model(
    writer: StoryModel,
    dataset: Dataset,
    split: str = VALIDATION,
    tick: Tick = lambda done, total: None,
    block_size: int | None = None,
    aligned: bool = False,
) -> Evaluation:
    """Evaluate a model on a whole split, in windows of the length it was trained with or of
    ``block_size``.

    Raises:
        UserError: a split is shorter than such a window.
    """
    length = writer.block_size if block_size is None else block_size
    if length < 1:
        raise UserError(f"block_size is {length}: it must be at least 1")
    dataset.require_window(length)
    return evaluate_split(
        writer.model, dataset.splits[split], length, writer.precision, tick, aligned
    )


def evaluate_run(
    folder: Path,
    checkpoint_name: str = "last",
    split: str = VALIDATION,
    data_dir: Path | None = None,
    device: str = "auto",
    tick: Tick = lambda done, total: None,
    block_size: int | None = None,
    aligned: bool = False,
) -> Evaluation:
    """Evaluate a run's model on a whole split of its data; see :func:`open_evaluation` and
    :func:`evaluate_model`."""
    writer, dataset = open_evaluation(folder, checkpoint_name, data_dir, device)
    return evaluate_model(writer, dataset, split, tick, block_size, aligned)
