"""Losses of a finished run, recomputed from its losses by story, from its weights and its data."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
from storylab.verify.machine import device_for, other_bits, rounding, threads_of
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
    why = other_bits(run, device)
    if why:
        yield Gap(f"losses were compared up to {rounding(run):g} nats, not to the last bit: {why}")
    model = load_story_model(RunFolder(subject.folder), "last", str(device))
    tick = partial(subject.progress, f"evaluating {subject.folder.name}")
    for split, file, recorded in _splits(run):
        data = dataset.splits[split] if split == VALIDATION else dataset.open_test()
        found = evaluate_split(model.model, data, model.block_size, model.precision, tick)
        losses = run.story_losses if split == VALIDATION else run.test_losses
        exact = [] if why else [(file, losses[:, 0], found.story_losses)]
        if not why and split == VALIDATION:
            exact.append((POSITION_LOSSES, run.position_losses, found.position_losses))
        for name, before, now in exact:
            if not np.array_equal(before, now):
                yield Difference(
                    name, f"{name} is not that of the last weights on the {split} split"
                )
        yield from _loss_fault(run, split, recorded.loss, found.loss, file, why)
    yield from _best_faults(subject, dataset, model)
    yield from _sample_faults(run, model, why)


def _loss_fault(
    run: Run, split: str, recorded: float, loss: float, file: str, why: str
) -> Iterator[Difference]:
    allowed = rounding(run) if why else 1e-9
    if not abs(recorded - loss) <= allowed:
        numbers = "" if split == TEST else f": {recorded:.6f}, but {loss:.6f}"
        yield Difference(
            SUMMARY, f"the {split} loss and {file} are not those of the last weights{numbers}"
        )


def _best_faults(subject: RunSubject, dataset: Dataset, model: StoryModel) -> Iterator[Finding]:
    """The estimate of the best weights; ``model`` gets them."""
    run, file = subject.run, f"{CHECKPOINTS}/best.safetensors"
    if "best" not in subject.checkpoints:
        if run.results.best_val_loss is not None:
            yield Difference(file, f"{file} is missing")
        return
    if find_recipe(run.config.dtype, run.config.recipe) is not None:
        yield Gap("the best loss was estimated in low precision, and is not computed again")
        return
    last = {name: value.clone() for name, value in model.model.state_dict().items()}
    try:
        checkpoint.load_weights(
            model.model, checkpoint.load(RunFolder(subject.folder).checkpoint("best"))[0]
        )
    except UserError as error:
        yield Difference(file, str(error))
        return
    precision, size, windows = model.precision, model.block_size, run.config.eval_iters
    found = estimate_loss(model.model, dataset.splits[VALIDATION], size, windows, precision)
    model.model.load_state_dict(last)
    recorded = run.results.best_val_loss
    allowed = rounding(run) if other_bits(run, precision.device) else 1e-9
    if recorded is None or not abs(recorded - found) <= allowed:
        yield Difference(SUMMARY, f"best_val_loss is {recorded}, but {found} from {file}")


def _sample_faults(run: Run, model: StoryModel, why: str) -> Iterator[Finding]:
    """Stories that the last weights do not write."""
    if why:
        yield Gap("samples were not written again, as one other bit may change them")
        return
    for number, sample in enumerate(run.results.samples):
        if model.sample(sample.prompt)[0] != sample.text:
            yield Difference(SUMMARY, f"sample {number + 1} is not what the last weights write")
