"""Losses of a finished run, recomputed from its losses by story, from its weights and its data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from msgspec import structs

from storylab.data.dataset import Dataset
from storylab.data.layout import TEST, VALIDATION
from storylab.data.manifest import Manifest, SplitInfo
from storylab.errors import UserError
from storylab.precision.edit import find_recipe
from storylab.record import checkpoint
from storylab.record.folder import POSITION_LOSSES, STORY_LOSSES, SUMMARY, TEST_LOSSES, RunFolder
from storylab.record.run import Run
from storylab.record.schema import SplitLoss
from storylab.record.stages import CHECKPOINTS
from storylab.training.evaluation import Evaluation, estimate_loss, evaluate_split
from storylab.training.sampling import StoryModel, load_story_model
from storylab.training.summary import evaluation_summary
from storylab.verify.findings import Difference, Finding, Gap, unequal
from storylab.verify.machine import allowed_rounding, device_for, other_bits, threads_of
from storylab.verify.run_data import find_dataset, find_manifest
from storylab.verify.run_files import RunSubject


def story_faults(subject: RunSubject) -> Iterator[Finding]:
    """Losses in the summary that are not those of the losses by story."""
    run = subject.run
    if not run.finished:
        return
    manifest = find_manifest(subject)
    for split, file, recorded in _splits(run):
        losses = run.story_losses if split == VALIDATION else run.test_losses
        computed = _of_stories(losses, run.position_losses, _text_bytes(manifest, split))
        hidden = split == TEST  # its losses are shown to nobody
        for field in structs.fields(SplitLoss):
            name = field.name
            if name == "bits_per_byte" and isinstance(manifest, Gap):
                continue
            if name == "block_size" and recorded.block_size is None:
                continue  # a summary of an earlier version
            found = unequal(
                SUMMARY, f"{split} {name}", getattr(recorded, name), getattr(computed, name), file
            )
            yield from _hidden(found, f"{name} of the {split} split", file) if hidden else found
    own = run.results.validation_own_precision
    if own is not None:
        name, perplexity = "perplexity in its own precision", math.exp(min(own.loss, 700))
        yield from unequal(SUMMARY, name, own.perplexity, perplexity, "its loss")


def _splits(run: Run) -> Iterator[tuple[str, str, SplitLoss]]:
    """The splits that a finished run was evaluated on, the files of their losses, and their losses."""
    yield VALIDATION, STORY_LOSSES, run.validation
    if run.results.test is not None:
        yield TEST, TEST_LOSSES, run.results.test


def _text_bytes(manifest: Manifest | Gap, split: str) -> int:
    info = None if isinstance(manifest, Gap) else getattr(manifest.splits, split)
    return info.text_bytes if isinstance(info, SplitInfo) else 1


def _of_stories(losses: np.ndarray, positions: np.ndarray, text_bytes: int) -> SplitLoss:
    """The summary's losses of a split from its losses by story ``[stories, 2]``, as at the run's end."""
    nats, tokens = np.ascontiguousarray(losses[:, 0]), losses[:, 1].astype(np.int64)
    return evaluation_summary(Evaluation(nats, tokens, positions, text_bytes))


def _hidden(found: Iterator[Difference], name: str, file: str) -> Iterator[Difference]:
    for difference in found:
        yield Difference(difference.file, f"the {name} is not that of {file}")


def evaluation_faults(subject: RunSubject) -> Iterator[Finding]:
    """Losses by story and by position that are not those of the last weights, and the loss of the best
    weights; to the last bit on the run's machine, and up to rounding on others."""
    run = subject.run
    dataset = find_dataset(subject)
    if isinstance(dataset, Gap) or not run.finished:
        yield dataset if isinstance(dataset, Gap) else Gap("the run has not finished")
        return
    with threads_of(run):
        yield from _computed_again(subject, dataset)


def _computed_again(subject: RunSubject, dataset: Dataset) -> Iterator[Finding]:
    run = subject.run
    device = device_for(run, subject.device)
    model = load_story_model(RunFolder(subject.folder), "last", str(device))
    rounding = Rounding(allowed_rounding(run), other_bits(run, device))
    tick = partial(subject.progress, f"evaluating {subject.folder.name}")
    for split, file, recorded in _splits(run):
        data = dataset.splits[split] if split == VALIDATION else dataset.open_test()
        found = evaluate_split(model.model, data, model.block_size, model.precision, tick)
        losses = run.story_losses if split == VALIDATION else run.test_losses
        same = np.array_equal(losses[:, 0], found.story_losses)
        if split == VALIDATION:
            same = same and np.array_equal(run.position_losses, found.position_losses)
            file = f"{file}, {POSITION_LOSSES}"
        if not same:
            # The test split's loss is shown to nobody.
            numbers = "" if split == TEST else f": {recorded.loss:.6f}, but {found.loss:.6f}"
            message = f"the {split} loss with {file} is not that of the last weights{numbers}"
            yield rounding.finding(abs(recorded.loss - found.loss), f"{split} loss", message)
    yield from _sample_faults(run, model, rounding)
    yield from _best_faults(subject, dataset, model, rounding)


@dataclass(frozen=True)
class Rounding:
    """How exactly this machine can compute a run's losses again.

    Attributes:
        allowed: by how many nats a token losses may differ between machines.
        why: why this machine's bits may be others; empty if they must be the same.
    """

    allowed: float
    why: str

    def finding(self, distance: float, name: str, message: str) -> Finding:
        """The finding that a loss is which is ``distance`` nats off, in at least one bit."""
        if self.why and distance <= self.allowed:
            return Gap(f"the {name} agrees up to rounding, not to the last bit: {self.why}")
        return Difference(SUMMARY, message)


def _sample_faults(run: Run, model: StoryModel, rounding: Rounding) -> Iterator[Finding]:
    """Stories that the last weights do not write."""
    for number, sample in enumerate(run.results.samples, start=1):
        if model.sample(sample.prompt)[0] == sample.text:
            continue
        if rounding.why:
            yield Gap(f"sample {number} is another, as one other bit can make it: {rounding.why}")
        else:
            yield Difference(SUMMARY, f"sample {number} is not what the last weights write")


def _best_faults(
    subject: RunSubject, dataset: Dataset, model: StoryModel, rounding: Rounding
) -> Iterator[Finding]:
    """The estimate of the best weights; ``model`` gets them."""
    run, file = subject.run, f"{CHECKPOINTS}/best.safetensors"
    recorded = run.results.best_val_loss
    if recorded is None:
        return
    if find_recipe(run.config.dtype, run.config.recipe) is not None:
        yield Gap("the best loss was estimated in low precision, and is not computed again")
        return
    try:
        tensors, _ = checkpoint.load(RunFolder(subject.folder).checkpoint("best"))
        checkpoint.load_weights(model.model, tensors)
    except UserError as error:
        yield Difference(file, str(error))
        return
    data, windows = dataset.splits[VALIDATION], run.config.eval_iters
    found = estimate_loss(model.model, data, model.block_size, windows, model.precision)
    if found != recorded:
        message = f"best_val_loss is {recorded}, but {found} from {file}"
        yield rounding.finding(abs(found - recorded), "best loss", message)
