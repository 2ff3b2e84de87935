"""The contents of a source that is imported: shape, weights, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from storylab.errors import UserError
from storylab.files import shown
from storylab.imported.shape import ImportedShape


@dataclass(frozen=True)
class Source:
    """A model as its source has it.

    Attributes:
        architecture: the class that computes it, in the words of its source.
        shape: sizes and options.
        weights: float32, bfloat16 or float16 tensors by the names that `transformers` gives them.
        tokenizer_file: name of the tokenizer's file in a model folder, which decides how it is read.
        tokenizer: content of that file.
        begin_of_text: id before a story, by the source's own rule.
        end_of_text: id after a story.
        files: the files that were read.
    """

    architecture: str
    shape: ImportedShape
    weights: dict[str, Tensor]
    tokenizer_file: str
    tokenizer: bytes
    begin_of_text: int
    end_of_text: int
    files: tuple[Path, ...]


# Reads a source: its path, and the path of its tokenizer where that is elsewhere.
ReadSource = Callable[[Path, Path | None], Source]


def require_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], place: Path
) -> None:
    """Compare the shapes of tensors by name.

    Raises:
        UserError: a tensor is missing, unknown, or of another shape.
    """
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{shown(place)} has no tensor {name}, which its config.json needs")
        if found[name] != shape:
            raise UserError(
                f"{shown(place)}: {name} is {list(found[name])}, where config.json needs {list(shape)}"
            )
    if extra := sorted(found.keys() - expected.keys()):
        raise UserError(
            f"{shown(place)}: {shown(extra[0])} is a tensor that the model's class does not have"
        )


def require_finite(weights: Mapping[str, Tensor], place: Path) -> None:
    """Raise a UserError if a weight is infinite or not a number."""
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{shown(place)}: {name} has weights that are not finite")
