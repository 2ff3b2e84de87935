"""``storylab eval``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from storylab.cli.arguments import AsJson, CheckpointName, RunFolder
from storylab.cli.documents import print_document
from storylab.cli.models import lossy_words, require_only_checkpoint
from storylab.cli.registry import Call, Verb
from storylab.documents.eval import EvalDocument
from storylab.errors import UserError
from storylab.imported import is_imported

if TYPE_CHECKING:
    from storylab.training.evaluation import Evaluation, Tick


@dataclass(frozen=True)
class EvalCommand:
    """Evaluate the model of a run, or an imported model, on a whole split: loss, perplexity, bits per byte,
    standard error.

    A loss depends on the length of the windows and on where they begin: only compare losses of the
    same windows. An imported model reads each story alone, as with --aligned.

    Examples: storylab eval runs/a | storylab eval runs/a --checkpoint best --split train
    | storylab eval runs/a --block_size 512 --aligned | storylab eval models/a --data_dir data/builtin-gpt2
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
    data_dir: Path | None = None
    """New place of the run's data set, if it has moved; for an imported model, the data set with the
    stories."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    json: AsJson = False


def run(call: Call) -> int:
    """Evaluate a model on a split."""
    command = call.parse(EvalCommand)
    if command.json:
        print_document(lambda: _document(command, *_evaluated(command)))
        return 0
    from storylab.training.log_format import windows_words

    result, lossy = _evaluated(command)
    print(f"read in        {windows_words(result.block_size, _aligned(command))}")
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"standard error {result.standard_error:.4f} over {len(result.story_losses):,} stories")
    print(f"perplexity     {result.perplexity:,.2f}")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    if lossy:
        print(f"not exact      {lossy_words(lossy)}")
    return 0


def _aligned(command: EvalCommand) -> bool:
    return command.aligned or is_imported(command.run)


def _evaluated(command: EvalCommand) -> tuple[Evaluation, int]:
    """The evaluation, and the number of stories that do not come back from the tokenizer."""
    from storylab.cli.console import ConsoleReporter

    with ConsoleReporter() as reporter:

        def tick(done: int, total: int) -> None:
            reporter.progress("evaluating", done, total)

        if is_imported(command.run):
            return _of_imported(command, tick)
        from storylab.training.evaluation import evaluate_run

        result = evaluate_run(
            command.run,
            command.checkpoint,
            command.split,
            command.data_dir,
            command.device,
            tick,
            command.block_size,
            command.aligned,
        )
        return result, 0


def _of_imported(command: EvalCommand, tick: Tick) -> tuple[Evaluation, int]:
    if command.data_dir is None:
        raise UserError("an imported model has no data of its own: give a data set with --data_dir")
    require_only_checkpoint(command.run, command.checkpoint)
    from storylab.data.dataset import load_dataset
    from storylab.imported.evaluation import evaluate_imported

    dataset = load_dataset(command.data_dir)
    return evaluate_imported(
        command.run, dataset, command.split, command.device, command.block_size, tick
    )


def _document(command: EvalCommand, result: Evaluation, lossy: int) -> EvalDocument:
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
        lossy_stories=lossy,
    )


VERB = Verb(
    "eval",
    "print loss, perplexity and bits per byte of a model on a whole split",
    "runs",
    run,
    EvalCommand,
    position=4,
    memory_remedy="take a smaller --block_size, or a machine with more memory",
)
