"""A run's data set: what the run recorded of it, and what the run computed from it at its start."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from storylab.data.batches import TrainingBatches
from storylab.data.dataset import TOKENIZER_FILE, Dataset
from storylab.data.layout import SPLITS, TRAIN
from storylab.data.manifest import Manifest, SplitInfo
from storylab.errors import UserError
from storylab.model.transformer import Transformer
from storylab.record import checkpoint
from storylab.record.folder import DATA, ENVIRONMENT, SUMMARY, RunFolder
from storylab.verify.findings import Difference, Finding, Gap, unequal
from storylab.verify.machine import other_draws
from storylab.verify.run_files import RunSubject


def tokenizer_faults(subject: RunSubject) -> Iterator[Finding]:
    """A tokenizer that is not the one of the run's data."""
    try:
        tokenizer = RunFolder(subject.folder).load_tokenizer()
    except UserError as error:
        yield Difference(TOKENIZER_FILE, str(error))
        return
    recorded = subject.run.data.tokenizer
    yield from unequal(
        DATA, "vocab_size", recorded.vocab_size, tokenizer.vocab_size, TOKENIZER_FILE
    )
    end = tokenizer.end_of_text
    yield from unequal(DATA, "end_of_text", recorded.end_of_text, end, TOKENIZER_FILE)


def find_manifest(subject: RunSubject) -> Manifest | Gap:
    """The manifest of the run's data set, or why there is none to compare with."""
    folder = subject.data_folder
    found = subject.data.manifest(folder)
    if isinstance(found, UserError):
        return Gap(f"the run's data set cannot be read; give its place as --data_dir ({found})")
    if found.fingerprint != subject.run.data.fingerprint:
        return Gap(f"{folder} is not the run's data set; give its place as --data_dir")
    return found


def find_dataset(subject: RunSubject) -> Dataset | Gap:
    """The run's data set, every byte of what training reads checked, or why there is none."""
    manifest = find_manifest(subject)
    if isinstance(manifest, Gap):
        return manifest
    found = subject.data.load(subject.data_folder)
    if isinstance(found, UserError):
        return Gap(f"the run's data set is damaged: {found}")
    return found


def data_faults(subject: RunSubject) -> Iterator[Finding]:
    """``data.json`` that is not what the manifest of the data set says."""
    manifest, data = find_manifest(subject), subject.run.data
    if isinstance(manifest, Gap):
        yield manifest
        return
    infos = {name: getattr(manifest.splits, name) for name in SPLITS}
    tokens = {name: info.tokens for name, info in infos.items() if isinstance(info, SplitInfo)}
    for name, recorded, expected in (
        ("tokenizer", data.tokenizer, manifest.tokenizer),
        ("dtype", data.dtype, manifest.dtype),
        ("request", data.request, manifest.request),
        ("tokens", data.tokens, tokens),
    ):
        yield from unequal(DATA, name, recorded, expected, "the data set's manifest.json", True)


def batch_faults(subject: RunSubject) -> Iterator[Finding]:
    """A first batch, epochs or unseen tokens that are not those of data, seed and config."""
    dataset, run = find_dataset(subject), subject.run
    if isinstance(dataset, Gap):
        yield dataset
        return
    config = run.config
    batches = TrainingBatches(
        dataset.splits[TRAIN],
        dataset.fingerprint,
        config.resolved_data_seed,
        config.block_size,
        config.batch_size * config.gradient_accumulation_steps,
    )
    first = hashlib.sha256(batches(0).numpy().tobytes()).hexdigest()
    recorded = run.environment.first_batch_sha256
    yield from unequal(ENVIRONMENT, "first_batch_sha256", recorded, first, "data and config")
    if run.summary is not None:
        epochs = batches.epochs(run.summary.iterations)
        yield from unequal(SUMMARY, "epochs", run.summary.epochs, epochs, "data and config")
        if run.summary.unseen_tokens is not None:
            unseen = batches.unseen
            yield from unequal(
                SUMMARY, "unseen_tokens", run.summary.unseen_tokens, unseen, "the data"
            )


def initial_weight_faults(subject: RunSubject) -> Iterator[Finding]:
    """Initial weights that are not those of the seed."""
    run = subject.run
    model = Transformer(run.config.model, run.data.tokenizer.vocab_size, run.config.seed)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    recorded, computed = run.environment.initial_weights_sha256, checkpoint.weights_sha256(weights)
    if recorded != computed and (why := other_draws(run)):
        yield Gap(f"other weights are drawn from the seed here: {why}")
        return
    yield from unequal(ENVIRONMENT, "initial_weights_sha256", recorded, computed, "the seed")
