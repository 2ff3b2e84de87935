"""``storylab eval``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from storylab.cli.arguments import AsJson, CheckpointName, RunFolder
from storylab.cli.documents import print_document
from storylab.cli.models import lossy_words, require_only_checkpoint
from storylab.cli.registry import Call, Verb
from storylab.config import at_most
from storylab.documents.eval import EvalDocument, SamplesEntry, TaskEntry, TextEntry
from storylab.errors import UserError
from storylab.imported import is_imported
from storylab.quality import MOST_SAMPLES, TaskName

if TYPE_CHECKING:
    from storylab.cli.console import ConsoleReporter
    from storylab.data.dataset import Dataset
    from storylab.quality.samples import TextMeasures
    from storylab.training.evaluation import Evaluation, Tick
    from storylab.training.sampling import StoryModel


@dataclass(frozen=True)
class EvalCommand:
    """Evaluate the model of a run, or an imported model, on a whole split: loss, perplexity, bits per byte,
    standard error.

    A loss depends on the length of the windows and on where they begin: only compare losses of the
    same windows. An imported model reads each story alone, as with --aligned. --tasks and --samples add
    measures of quality beyond the loss (docs/guide/quality.md).

    Examples: storylab eval runs/a | storylab eval runs/a --checkpoint best --split train
    | storylab eval runs/a --block_size 512 --aligned | storylab eval models/a --data_dir data/builtin-gpt2
    | storylab eval runs/a --tasks last_word endings --samples 100
    """

    run: RunFolder
    """Run folder, or folder of an imported model."""
    checkpoint: CheckpointName = "last"
    """The newest weights, or those with the best validation loss."""
    split: Literal["validation", "train"] = "validation"
    """Which stories."""
    block_size: int | None = None
    """Tokens in a window; by default as many as in training, for an imported model 512."""
    aligned: bool = False
    """Start a new window at every story, instead of reading all stories as one sequence."""
    tasks: tuple[TaskName, ...] = ()
    """Also answer questions made from validation stories, under lm-evaluation-harness: the last word of a
    story; the right ending among four."""
    questions: int = 1000
    """Most questions of a task."""
    samples: int = 0
    """Also write this many stories, and measure their variety, the spans that they copy from training
    stories, and how many end."""
    max_new_tokens: int = 512
    """Longest of these stories, in tokens."""
    data_dir: Path | None = None
    """New place of the run's data set, if it has moved; for an imported model, the data set with the
    stories."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    json: AsJson = False


def run(call: Call) -> int:
    """Evaluate a model on a split."""
    command = call.parse(EvalCommand)
    _check(command)
    if command.json:
        print_document(lambda: _evaluated(command))
        return 0
    for line in _lines(_evaluated(command)):
        print(line)
    return 0


def _check(command: EvalCommand) -> None:
    """Raise a UserError for flags that cannot be used, before any work."""
    for name, least in (("questions", 1), ("samples", 0), ("max_new_tokens", 1)):
        value = getattr(command, name)
        if value < least:
            raise UserError(f"{name} is {value}: it must be at least {least}")
    at_most(MOST_SAMPLES, "samples", command.samples)
    if len(set(command.tasks)) < len(command.tasks):
        raise UserError("--tasks names a task twice")
    if command.tasks and find_spec("lm_eval") is None:
        raise UserError(
            "--tasks needs the package lm-evaluation-harness: pip install 'storylab[eval]'"
        )


def _evaluated(command: EvalCommand) -> EvalDocument:
    from storylab.cli.console import ConsoleReporter

    losses = _of_imported if is_imported(command.run) else _of_run
    with ConsoleReporter() as reporter:
        model, dataset, result, lossy = losses(
            command, lambda done, total: reporter.progress("evaluating", done, total)
        )
        tasks = _tasks(command, model, dataset, reporter)
        samples = _samples(command, model, dataset, reporter) if command.samples else None
    return EvalDocument(
        run=str(command.run),
        checkpoint="imported" if is_imported(command.run) else command.checkpoint,
        split=command.split,
        block_size=result.block_size,
        aligned=_aligned(command),
        loss_nats_per_token=result.loss,
        standard_error_nats_per_token=result.standard_error,
        perplexity=result.perplexity,
        bits_per_byte=result.bits_per_byte,
        stories=len(result.story_losses),
        tokens=int(result.story_tokens.sum()),
        text_bytes=result.text_bytes,
        tasks=tasks,
        samples=samples,
        lossy_stories=lossy,
    )


def _aligned(command: EvalCommand) -> bool:
    return command.aligned or is_imported(command.run)


def _of_run(command: EvalCommand, tick: Tick) -> tuple[StoryModel, Dataset, Evaluation, int]:
    """The model, its data, its losses, and the number of stories that the tokenizer changes."""
    from storylab.training.evaluation import evaluate_model, open_evaluation

    model, dataset = open_evaluation(
        command.run, command.checkpoint, command.data_dir, command.device
    )
    result = evaluate_model(
        model, dataset, command.split, tick, command.block_size, command.aligned
    )
    return model, dataset, result, 0


def _of_imported(command: EvalCommand, tick: Tick) -> tuple[StoryModel, Dataset, Evaluation, int]:
    """As :func:`_of_run`."""
    if command.data_dir is None:
        raise UserError("an imported model has no data of its own: give a data set with --data_dir")
    require_only_checkpoint(command.run, command.checkpoint)
    from storylab.data.dataset import load_dataset
    from storylab.imported.evaluation import evaluate_imported
    from storylab.imported.folder import load_imported

    dataset = load_dataset(command.data_dir)
    model, tokenizer = load_imported(command.run, command.device)
    result, lossy = evaluate_imported(
        model, tokenizer, dataset, command.split, command.block_size, tick
    )
    return model, dataset, result, lossy


def _tasks(
    command: EvalCommand, model: StoryModel, dataset: Dataset, reporter: ConsoleReporter
) -> list[TaskEntry]:
    if not command.tasks:
        return []
    from storylab.quality.harness import answer
    from storylab.quality.questions import TASKS, held_out_stories

    stories = held_out_stories(dataset)
    questions = {name: TASKS[name].make(stories, command.questions) for name in command.tasks}
    scores = answer(
        model, questions, lambda done, total: reporter.progress("answering", done, total)
    )
    return [TaskEntry(**asdict(score)) for score in scores]


def _samples(
    command: EvalCommand, model: StoryModel, dataset: Dataset, reporter: ConsoleReporter
) -> SamplesEntry:
    from storylab.model.generate import Sampling
    from storylab.quality.samples import (
        held_out_sample,
        in_ids_of,
        measure,
        write_samples,
    )

    sampling = Sampling()
    written = write_samples(
        model,
        command.samples,
        command.max_new_tokens,
        sampling,
        lambda done, total: reporter.progress("writing", done, total),
    )
    held_out = held_out_sample(dataset, command.samples, command.max_new_tokens)
    found, reference = measure(
        [in_ids_of(dataset.tokenizer, written.stories, model.tokenizer), held_out],
        dataset,
        lambda done, total: reporter.progress("searching", done, total),
    )
    return SamplesEntry(
        max_new_tokens=command.max_new_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed,
        ended=written.ended,
        written=_text_entry(found),
        held_out=_text_entry(reference),
    )


def _text_entry(measures: TextMeasures) -> TextEntry:
    values = asdict(measures)
    values |= {f"distinct_{n}": share for n, share in enumerate(values.pop("distinct"), 1)}
    return TextEntry(**values)


def _lines(found: EvalDocument) -> Iterator[str]:
    from storylab.training.log_format import windows_words

    yield f"read in        {windows_words(found.block_size, found.aligned)}"
    yield f"loss           {found.loss_nats_per_token:.4f} nats per token"
    error = found.standard_error_nats_per_token
    yield f"standard error {error:.4f} over {found.stories:,} stories"
    yield f"perplexity     {found.perplexity:,.2f}"
    yield f"bits per byte  {found.bits_per_byte:.4f}"
    if found.lossy_stories:
        yield f"not exact      {lossy_words(found.lossy_stories)}"
    for task in found.tasks:
        yield (
            f"{task.task:<14} {task.metric.replace('_', ' ')} {task.value:.1%} (standard error "
            f"{task.standard_error:.1%}, chance {task.chance:.1%}, {task.items:,} questions)"
        )
    if found.samples:
        yield from _sample_lines(found.samples)


def _sample_lines(samples: SamplesEntry) -> Iterator[str]:
    from storylab.training.log_format import printable

    ours, theirs = samples.written, samples.held_out
    yield (
        f"stories        {ours.stories:,} of the model (temperature {samples.temperature:g}), "
        f"{theirs.stories:,} validation stories; at most {samples.max_new_tokens:,} tokens each"
    )
    yield f"ended          {samples.ended:.1%} of the model's before that limit"
    for name in ("distinct_1", "distinct_2", "distinct_3"):
        values = [getattr(side, name) for side in (ours, theirs)]
        yield f"{name.replace('_', '-'):<14} {values[0]:.4f}; validation {values[1]:.4f}"
    yield f"copied         {ours.copied_tokens:.1f} tokens; validation {theirs.copied_tokens:.1f}"
    yield (
        f"longest copied {ours.longest_copied_tokens:,} tokens; validation "
        f"{theirs.longest_copied_tokens:,}"
    )
    yield f"               {' '.join(printable(ours.longest_copied_text).split())}"


VERB = Verb(
    "eval",
    "print a model's losses on a whole split, its answers to questions, measures of samples",
    "runs",
    run,
    EvalCommand,
    position=4,
    memory_remedy="take a smaller --block_size or fewer --samples, or a machine with more memory",
)
