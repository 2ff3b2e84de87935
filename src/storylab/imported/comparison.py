"""Models against each other on the same stories, whatever their tokenizers, in bits per byte.

This compares two models as they are, with an interval over stories. It says nothing about recipes: another
seed of either would give another model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storylab.data.dataset import Dataset, load_dataset
from storylab.data.layout import VALIDATION
from storylab.errors import UserError
from storylab.experiments.statistics import Interval, story_interval
from storylab.files import shown
from storylab.imported import is_imported
from storylab.imported.evaluation import evaluate_imported, story_texts
from storylab.imported.folder import load_imported
from storylab.record.folder import open_run
from storylab.training.evaluation import Evaluation, evaluate_run

# Called with a model's folder, the windows done, and all of them.
Progress = Callable[[Path, int, int], None]


@dataclass(frozen=True)
class ComparedModel:
    """A model on the stories that all models read.

    Attributes:
        folder: a run or an imported model.
        imported: which of the two.
        block_size: tokens in a window.
        bits: bits to code each story but the first, ``[n]``.
        text_bytes: UTF-8 bytes of those stories, ``[n]``.
        lossy_stories: stories that do not come back from the model's tokenizer.
    """

    folder: Path
    imported: bool
    block_size: int
    bits: np.ndarray
    text_bytes: np.ndarray
    lossy_stories: int

    @property
    def bits_per_byte(self) -> float:
        """Bits to code the stories and their ends, over the bytes of their text."""
        return float(self.bits.sum() / self.text_bytes.sum())

    def difference(self, baseline: ComparedModel) -> Interval:
        """Bits per byte minus those of ``baseline``, paired by story.

        Raises:
            UserError: there are fewer than two stories.
        """
        found = story_interval(self.bits, baseline.bits, self.text_bytes)
        if found is None:
            raise UserError("a comparison of models needs three stories or more: prepare more text")
        return found


def compare_models(
    folders: Sequence[Path],
    data_dir: Path | None,
    progress: Progress,
    device: str = "auto",
) -> list[ComparedModel]:
    """Evaluate models on the validation stories of a data set, each story read alone.

    The first story is left out: in our data sets its first token has nothing before it.

    Args:
        folders: runs and imported models.
        data_dir: a data set whose stories are read; by default that of the first run.
        progress: called before every batch.
        device: where to compute.

    Raises:
        UserError: a model or a data set cannot be used, or two runs have other stories.
    """
    datasets = {folder: _run_data(folder, None) for folder in folders if not is_imported(folder)}
    if data_dir is not None:
        shared = load_dataset(data_dir)
    elif datasets:
        shared = next(iter(datasets.values()))
    else:
        raise UserError(
            "imported models have no data of their own: give a data set with --data_dir"
        )
    split = shared.splits[VALIDATION]
    text_bytes = np.diff(split.stories[:, 1])[1:]
    found = []
    for folder in folders:
        own = datasets.get(folder)
        lossy = 0
        if own is None:
            evaluation, lossy = evaluate_imported(
                *load_imported(folder, device), shared, tick=_ticker(progress, folder)
            )
        else:
            _require_same_stories(folder, own, shared)
            evaluation = evaluate_run(
                folder,
                data_dir=own.folder,
                device=device,
                tick=_ticker(progress, folder),
                aligned=True,
            )
        found.append(_compared(folder, own is None, evaluation, text_bytes, lossy))
    return found


def _run_data(folder: Path, data_dir: Path | None) -> Dataset:
    run = open_run(folder)
    return run.load_data(data_dir or run.read_config().data_dir)


def _ticker(progress: Progress, folder: Path) -> Callable[[int, int], None]:
    return lambda done, total: progress(folder, done, total)


def _compared(
    folder: Path, imported: bool, evaluation: Evaluation, text_bytes: np.ndarray, lossy: int
) -> ComparedModel:
    bits = evaluation.story_losses[1:] / math.log(2)
    return ComparedModel(folder, imported, evaluation.block_size, bits, text_bytes, lossy)


def _require_same_stories(folder: Path, own: Dataset, shared: Dataset) -> None:
    """Raise a UserError if the validation stories of a run are not those that all models read.

    Two data sets of one source have the same stories, whatever their tokenizers.
    """
    if own.fingerprint == shared.fingerprint:
        return
    pair = [story_texts(data.splits[VALIDATION], data.tokenizer) for data in (own, shared)]
    counts = [len(data.splits[VALIDATION].stories) for data in (own, shared)]
    if counts[0] != counts[1] or any(a != b for a, b in zip(*pair, strict=True)):
        raise UserError(
            f"{shown(folder)} has other validation stories than "
            f"{shown(shared.folder)}: models compare on the same stories alone"
        )
