"""Models as they are, ours and imported ones, in words and documents; shared by several verbs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from storylab.documents.compare import CompareDocument, ModelBits
from storylab.errors import UserError

if TYPE_CHECKING:
    from storylab.imported.comparison import ComparedModel


def require_only_checkpoint(folder: Path, checkpoint: str) -> None:
    """Raise a UserError if another checkpoint than the one of an imported model is asked for."""
    if checkpoint != "last":
        raise UserError(f"{folder} is an imported model, which has no {checkpoint} checkpoint")


def lossy_words(stories: int) -> str:
    """A line for stories that a tokenizer changes."""
    return (
        f"{stories:,} stories do not come back from the tokenizer: their bits are of another text"
    )


def compare_folders(folders: Sequence[Path], data_dir: Path | None) -> list[ComparedModel]:
    """Compare models under a progress bar; see :func:`storylab.imported.comparison.compare_models`."""
    from storylab.cli.console import ConsoleReporter
    from storylab.imported.comparison import compare_models

    with ConsoleReporter() as reporter:
        return compare_models(
            folders,
            data_dir,
            lambda folder, done, total: reporter.progress(f"evaluating {folder.name}", done, total),
        )


def print_models(models: Sequence[ComparedModel]) -> None:
    """Print each model, and its difference from the first."""
    first = models[0]
    width = max(len(str(model.folder)) for model in models)
    print(
        f"{len(first.bits):,} validation stories, each read alone, in bits per byte with 95 % "
        "intervals over stories"
    )
    for model in models:
        line = f"{model.folder!s:<{width}}  {model.bits_per_byte:.4f}"
        if model is not first:
            found = model.difference(first)
            line += f"  {found.estimate:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
        print(f"{line}  windows of {model.block_size} tokens{', imported' * model.imported}")
        if model.lossy_stories:
            print(f"  {lossy_words(model.lossy_stories)}")
    print("This compares models, not recipes: another seed of a recipe gives another model.")


def models_document(folders: Sequence[Path], models: Sequence[ComparedModel]) -> CompareDocument:
    """The document of such a comparison."""
    differences = [model.difference(models[0]) for model in models]
    return CompareDocument(
        runs=list(map(str, folders)),
        experiment=None,
        comparisons=[],
        effects=[],
        exit_code=0,
        neighbors=[],
        left_out=[],
        models=[
            ModelBits(
                folder=str(model.folder),
                imported=model.imported,
                block_size=model.block_size,
                bits_per_byte=model.bits_per_byte,
                difference_bits_per_byte=found.estimate,
                low_bits_per_byte=found.low,
                high_bits_per_byte=found.high,
                lossy_stories=model.lossy_stories,
            )
            for model, found in zip(models, differences, strict=True)
        ],
    )
