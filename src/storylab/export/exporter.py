"""The interface of a format, and the model that it writes."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Protocol

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from storylab.config import ModelConfig
from storylab.data.tokenizer import Tokenizer
from storylab.errors import UserError
from storylab.model.transformer import Transformer
from storylab.record import checkpoint
from storylab.record.folder import open_run
from storylab.record.run import Run


@dataclass(frozen=True)
class Source:
    """A run's model to export.

    Attributes:
        run: the record of the run.
        checkpoint: the checkpoint that the weights come from, ``best`` or ``last``.
        model: the model in float32 on the CPU.
        tokenizer: the tokenizer of the run's data.
    """

    run: Run
    checkpoint: str
    model: Transformer
    tokenizer: Tokenizer

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.model.config

    @property
    def block_size(self) -> int:
        """Greatest number of tokens that the model was trained to read at once."""
        return self.run.config.block_size

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by our names, float32."""
        return {name: value.detach() for name, value in self.model.state_dict().items()}


def load_weights(run: Run, name: str) -> Source:
    """The model of ``run`` with the weights of checkpoint ``name``.

    Raises:
        UserError: the checkpoint is missing or altered, or its weights are not finite.
    """
    folder = open_run(run.folder)
    tokenizer = folder.load_tokenizer()
    path = folder.checkpoint(name)
    tensors, _ = checkpoint.load(path)
    model = Transformer(run.config.model, tokenizer.vocab_size)
    checkpoint.load_weights(model, tensors)
    if not all(torch.isfinite(value).all() for value in model.parameters()):
        raise UserError(f"{path} has weights that are not finite: export another checkpoint")
    return Source(run, name, model.eval(), tokenizer)


class Reader(Protocol):
    """An exported model, opened by the program that the format is for."""

    @property
    def label(self) -> str:
        """Name and version of that program."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a story's beginning, with the id that begins a story."""
        ...

    def logits(self, ids: list[int]) -> Tensor:
        """Logits ``[T, V]`` float32 of the token after each of ``ids``."""
        ...

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The ``count`` most likely next tokens in turn; fewer if one of them ends the story."""
        ...


class Exporter(ABC):
    """A format.

    Attributes:
        label: its name in messages and in the model card.
        program: package that opens it, for the check at the end of an export.
        install: the command that installs the program.
        weights: the types of weights that it can hold; the first is the default.
        tolerances: for each of those types, the largest difference of a logit, as a share of the largest
            logit, by which the program may differ from our model.
    """

    label: ClassVar[str]
    program: ClassVar[str]
    install: ClassVar[str]
    weights: ClassVar[tuple[str, ...]]
    tolerances: ClassVar[Mapping[str, float]]

    @abstractmethod
    def refuse(self, config: ModelConfig, block_size: int, weights: str) -> None:
        """Raise a UserError if the format has no honest place for such a model."""

    @abstractmethod
    def class_name(self, config: ModelConfig) -> str:
        """The model class that programs of this format use for it."""

    @abstractmethod
    def write(self, source: Source, weights: str, folder: Path) -> None:
        """Write model and tokenizer into ``folder``, which is empty.

        Raises:
            UserError: a package is missing.
        """

    @abstractmethod
    def as_written(self, source: Source, weights: str) -> Transformer:
        """Our model with the weights as the format rounds them, in float32."""

    @abstractmethod
    def read_back(self, source: Source, weights: str, folder: Path) -> str:
        """Compare the tensors of the written files with the model's, without the program.

        Returns:
            the finding in a line.

        Raises:
            UserError: they differ.
        """

    @abstractmethod
    def open(self, folder: Path) -> Reader:
        """Open the exported model with :attr:`program`.

        Raises:
            UserError: it is not installed, or does not open the files.
        """

    @abstractmethod
    def usage(self, weights: str) -> str:
        """Lines for the model card that show how to write a story with the exported model, as Markdown."""


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    try:
        save_file(tensors, path, {"format": "pt"})
    except safetensors.SafetensorError as error:
        # The library wraps the system's message, such as "No space left on device".
        raise OSError(None, str(error)) from error
    path.chmod(0o644)  # the library leaves it readable by its owner alone


def installed(module: str) -> bool:
    """Whether ``module`` can be imported; it is not."""
    return importlib.util.find_spec(module) is not None


def require(module: str, install: str) -> ModuleType:
    """Import an optional package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed: {install}") from error
