"""``storylab eval``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from storylab.cli.arguments import AsJson, CheckpointName, RunFolder
from storylab.cli.documents import print_document
from storylab.cli.registry import Call, Verb
from storylab.documents.eval import EvalDocument

if TYPE_CHECKING:
    from storylab.training.evaluation import Evaluation


@dataclass(frozen=True)
class EvalCommand:
    """Evaluate a run's model on a whole split: loss, perplexity, bits per byte, standard error.

    A loss depends on the length of the windows and on where they begin: only compare losses of the
    same windows.

    Examples: storylab eval runs/a | storylab eval runs/a --checkpoint best --split train
    | storylab eval runs/a --block_size 512 --aligned
    """

    run: RunFolder
    """Run folder."""
    checkpoint: CheckpointName = "last"
    """The newest weights, or those with the best validation loss."""
    split: Literal["validation", "train"] = "validation"
    """Which stories."""
    block_size: int | None = None
    """Tokens in a window; by default as many as in training."""
    aligned: bool = False
    """Start a new window at every story, instead of reading all stories as one sequence."""
    data_dir: Path | None = None
    """New place of the run's data set, if it has moved."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    json: AsJson = False


def run(call: Call) -> int:
    """Evaluate a run's model on a split."""
    command = call.parse(EvalCommand)
    if command.json:
        print_document(lambda: _document(command, _evaluated(command)))
        return 0
    from storylab.training.log_format import windows_words

    result = _evaluated(command)
    print(f"read in        {windows_words(result.block_size, command.aligned)}")
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"standard error {result.standard_error:.4f} over {len(result.story_losses):,} stories")
    print(f"perplexity     {result.perplexity:,.2f}")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    return 0


def _evaluated(command: EvalCommand) -> Evaluation:
    from storylab.cli.console import ConsoleReporter
    from storylab.training.evaluation import evaluate_run

    with ConsoleReporter() as reporter:
        return evaluate_run(
            command.run,
            command.checkpoint,
            command.split,
            command.data_dir,
            command.device,
            lambda done, total: reporter.progress("evaluating", done, total),
            command.block_size,
            command.aligned,
        )


def _document(command: EvalCommand, result: Evaluation) -> EvalDocument:
    return EvalDocument(
        run=str(command.run),
        checkpoint=command.checkpoint,
        split=command.split,
        block_size=result.block_size,
        aligned=command.aligned,
        loss_nats_per_token=result.loss,
        standard_error_nats_per_token=result.standard_error,
        perplexity=result.perplexity,
        bits_per_byte=result.bits_per_byte,
        stories=len(result.story_losses),
        tokens=int(result.story_tokens.sum()),
        text_bytes=result.text_bytes,
    )


VERB = Verb(
    "eval",
    "print loss, perplexity and bits per byte of a run on a whole split",
    "runs",
    run,
    EvalCommand,
    position=4,
    memory_remedy="take a smaller --block_size, or a machine with more memory",
)
