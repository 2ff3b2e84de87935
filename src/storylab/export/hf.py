"""The format of `transformers`: a folder that opens without code of ours.

https://huggingface.co/docs/transformers/main_classes/configuration
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from storylab.config import ModelConfig
from storylab.data.layout import END_OF_TEXT
from storylab.errors import UserError
from storylab.export.bpe import tokenizer_json
from storylab.export.classes import model_class, named_weights, shared_keys
from storylab.export.exporter import Exporter, Reader, Source, require, save_tensors
from storylab.files import write_json, write_text
from storylab.model.transformer import Transformer

WEIGHTS = "model.safetensors"


class HuggingFace(Exporter):
    """A folder for ``AutoModelForCausalLM`` and ``pipeline("text-generation")``."""

    label = "Hugging Face"
    program = "transformers"
    install = "pip install 'storylab[hf]'"
    weights = ("f32",)
    tolerances: ClassVar[Mapping[str, float]] = {"f32": 1e-4}

    def refuse(self, config: ModelConfig, block_size: int, weights: str) -> None:
        model_class(config)

    def class_name(self, config: ModelConfig) -> str:
        return model_class(config).architecture

    def write(self, source: Source, weights: str, folder: Path) -> None:
        end = source.tokenizer.end_of_text
        kind, vocab_size = model_class(source.config), source.tokenizer.vocab_size
        config = {
            "architectures": [kind.architecture],
            "model_type": kind.model_type,
            **shared_keys(source.config, vocab_size, source.block_size),
            **kind.keys(source.config),
            "bos_token_id": end,
            "eos_token_id": end,
            "dtype": "float32",
            "torch_dtype": "float32",  # the name before transformers 5
        }
        write_json(folder / "config.json", config)
        # A pad id in config.json would stop the gradient of that id's embedding.
        generation = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        write_json(folder / "generation_config.json", generation)
        write_text(folder / "tokenizer.json", tokenizer_json(source.tokenizer))
        write_json(folder / "tokenizer_config.json", _tokenizer_config(source.block_size))
        save_tensors(self._tensors(source), folder / WEIGHTS)

    def _tensors(self, source: Source) -> dict[str, Tensor]:
        named = named_weights(source.config, source.weights)
        return {name: value.contiguous().clone() for name, value in named.items()}

    def as_written(self, source: Source, weights: str) -> Transformer:
        return source.model

    def read_back(self, source: Source, weights: str, folder: Path) -> str:
        read, expected = load_file(folder / WEIGHTS), self._tensors(source)
        same = read.keys() == expected.keys() and all(map(torch.equal, *_paired(read, expected)))
        if not same:
            raise UserError(f"{folder / WEIGHTS} does not hold the run's weights: export it again")
        return f"{len(read)} tensors of {WEIGHTS} read back, equal"

    def open(self, folder: Path) -> Reader:
        return _Transformers(folder)

    def usage(self, weights: str) -> str:
        return (
            "```python\n"
            "from transformers import pipeline\n\n"
            'write = pipeline("text-generation", model="PATH")\n'
            'story = write("Once upon a time", max_new_tokens=200, do_sample=True, temperature=0.8)\n'
            'print(story[0]["generated_text"])\n'
            "```"
        )


def _paired(first: dict[str, Tensor], second: dict[str, Tensor]) -> tuple[list[Tensor], ...]:
    return [first[name] for name in second], list(second.values())


def _tokenizer_config(block_size: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }


class _Transformers:
    """An exported folder in `transformers`, in float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        library = require("transformers", HuggingFace.install)
        with _quiet():
            self.label = f"transformers {library.__version__}"
            place = str(folder.resolve())
            try:
                self._tokenizer = library.AutoTokenizer.from_pretrained(
                    place, local_files_only=True, trust_remote_code=False
                )
                self._model = library.AutoModelForCausalLM.from_pretrained(
                    place, local_files_only=True, trust_remote_code=False, use_safetensors=True
                ).eval()
            except Exception as error:  # of many kinds, if a file has been altered
                reason = str(error).partition("\n")[0]
                raise UserError(f"{self.label} does not open {folder}: {reason}") from error

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def logits(self, ids: list[int]) -> Tensor:
        with torch.no_grad(), _quiet():
            logits: Tensor = self._model(torch.tensor([ids])).logits[0]
        return logits.float()

    def greedy(self, ids: list[int], count: int) -> list[int]:
        prompt = torch.tensor([ids])
        with _quiet():
            tokens = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                do_sample=False,
            )
        return [int(token) for token in tokens[0, len(ids) :]]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's advice, which is about other uses than this one."""
    library = require("transformers", HuggingFace.install).utils.logging
    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


EXPORTER = HuggingFace()
