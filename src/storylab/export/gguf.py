"""The format of llama.cpp: one ``.gguf`` file with model and tokenizer, in F16 or Q8_0.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from storylab.config import ModelConfig
from storylab.data.layout import END_OF_TEXT
from storylab.errors import UserError
from storylab.export.bpe import byte_level_tokens, merges
from storylab.export.classes import model_class, named_weights
from storylab.export.exporter import Exporter, Reader, Source, require
from storylab.model.layers import NORM_EPS
from storylab.model.transformer import Transformer

INSTALL = "pip install 'storylab[gguf]'"
# Weights of a row that share a scale in Q8_0.
Q8_BLOCK = 32
MOST_F16 = 65504.0


class LlamaCpp(Exporter):
    """A file for llama.cpp and the programs that are built on it."""

    label = "llama.cpp"
    program = "llama_cpp"
    install = "pip install llama-cpp-python"
    weights = ("f16", "q8_0")
    # llama.cpp rounds the states that it multiplies by such weights: to F16, or to 8 bits in blocks.
    tolerances: ClassVar[Mapping[str, float]] = {"f16": 0.01, "q8_0": 0.1}

    def refuse(self, config: ModelConfig, block_size: int, weights: str) -> None:
        model_class(config)
        architecture = _architecture(config)
        cut = [p for p in config.layer_patterns if not p.covers(block_size)]
        if cut:
            raise UserError(
                f"llama.cpp would drop the {cut[0].label}: its {architecture} architecture has none, "
                f"so every layer would read all positions. Use --format hf, or train with --attention full"
            )
        for name, size in (("n_embd", config.n_embd), ("n_hidden", config.n_hidden)):
            if weights == "q8_0" and size % Q8_BLOCK:
                raise UserError(
                    f"q8_0 stores rows in blocks of {Q8_BLOCK} weights, and {name} {size} is no multiple "
                    f"of {Q8_BLOCK}: use --weights f16"
                )

    def class_name(self, config: ModelConfig) -> str:
        return f"{_architecture(config)} of llama.cpp"

    def write(self, source: Source, weights: str, folder: Path) -> None:
        gguf = require("gguf", INSTALL)
        path = _file(folder, weights)
        writer = gguf.GGUFWriter(path, _architecture(source.config))
        writer.add_name(source.run.folder.resolve().name)
        kind = gguf.LlamaFileType
        writer.add_file_type(kind.MOSTLY_F16 if weights == "f16" else kind.MOSTLY_Q8_0)
        _add_shape(writer, source)
        _add_tokenizer(writer, source, gguf.TokenType)
        for name, values, dtype in _stored(source, weights):
            # The shape of packed weights is in bytes; the writer needs no other.
            writer.add_tensor(name, values, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def as_written(self, source: Source, weights: str) -> Transformer:
        """Our model with its matrices rounded to the type of the file."""
        rounded = Transformer(source.config, source.tokenizer.vocab_size)
        values = {
            name: _rounded(value, weights) if value.dim() == 2 else value
            for name, value in source.weights.items()
        }
        rounded.load_state_dict(values)
        return rounded.eval()

    def read_back(self, source: Source, weights: str, folder: Path) -> str:
        gguf = require("gguf", INSTALL)
        path = _file(folder, weights)
        read = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for tensor in gguf.GGUFReader(path).tensors
        }
        rounded = Source(
            source.run, source.checkpoint, self.as_written(source, weights), source.tokenizer
        )
        expected = {name: value.numpy() for name, value in _named(rounded)}
        if read.keys() != expected.keys():
            raise UserError(f"{path} has other tensors than the run's model: export it again")
        for name, value in expected.items():
            if not np.array_equal(read[name].reshape(value.shape), value):
                raise UserError(f"{path}: {name} is not the run's: export it again")
        return f"{len(read)} tensors of {path.name} read back, equal to the rounded weights"

    def open(self, folder: Path) -> Reader:
        return _Llama(folder)

    def usage(self, weights: str) -> str:
        return (
            "```python\n"
            "from llama_cpp import Llama\n\n"
            f'model = Llama("PATH/{_file(Path(), weights).name}")\n'
            'story = model("Once upon a time", max_tokens=200, temperature=0.8)\n'
            'print(story["choices"][0]["text"])\n'
            "```"
        )


def _file(folder: Path, weights: str) -> Path:
    return folder / f"model-{weights}.gguf"


def _architecture(config: ModelConfig) -> str:
    """llama.cpp's name for the model, windows aside: its Llama, or its Qwen3 for a QK norm."""
    return "qwen3" if config.qk_norm else "llama"


def _add_shape(writer: Any, source: Source) -> None:
    config = source.config
    writer.add_context_length(source.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_hidden)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_vocab_size(source.tokenizer.vocab_size)


def _add_tokenizer(writer: Any, source: Source, kinds: Any) -> None:
    tokenizer = source.tokenizer
    tokens = byte_level_tokens(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # GPT-2's rule for cutting text into words
    writer.add_token_list([*tokens, END_OF_TEXT])
    writer.add_token_types([*[kinds.NORMAL] * len(tokens), kinds.CONTROL])
    writer.add_token_merges([f"{first} {second}" for first, second in merges(tokenizer)])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(True)


def _named(source: Source) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under llama.cpp's names, its rows in llama.cpp's order."""
    import gguf

    config = source.config
    architecture = gguf.MODEL_ARCH[_architecture(config).upper()]
    names = gguf.get_tensor_name_map(architecture, config.n_layer)
    for theirs, value in named_weights(config, source.weights).items():
        name = names.get_name(theirs, try_suffixes=(".weight",))
        assert name is not None
        if not config.qk_norm:
            if theirs.endswith("q_proj.weight"):
                value = neighbors_rotate(value, config.n_head)
            if theirs.endswith("k_proj.weight"):
                value = neighbors_rotate(value, config.n_kv_head)
        yield name, value


def neighbors_rotate(rows: Tensor, heads: int) -> Tensor:
    """The rows of queries or keys, reordered for a rotation of neighboring channels.

    We rotate channel i of a head together with channel i + D/2, as `transformers` and llama.cpp's Qwen3 do.
    llama.cpp's Llama rotates channels 2i and 2i + 1 by the same angle (LLAMA_ROPE_TYPE_NORM). Scores stay
    the same, as queries and keys are reordered in the same way.

    Args:
        rows: ``[heads * D, C]``.
        heads: number of heads.

    Returns:
        ``[heads * D, C]``; row 2i of a head is our row i, and row 2i + 1 is our row i + D/2.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def _rounded(value: Tensor, weights: str) -> Tensor:
    """``value`` as the file holds it, float32."""
    import gguf

    if weights == "f16":
        return value.half().float()
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(value.numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(packed, kind))


def _stored(source: Source, weights: str) -> Iterator[tuple[str, np.ndarray, Any]]:
    """Names, values and types of the file's tensors. Gains stay in F32, as llama.cpp needs them.

    Raises:
        UserError: a weight is beyond the range of F16.
    """
    import gguf

    kinds = gguf.GGMLQuantizationType
    kind = kinds.F16 if weights == "f16" else kinds.Q8_0
    for name, value in _named(source):
        if value.dim() < 2:
            yield name, value.numpy(), kinds.F32
            continue
        if float(value.abs().max()) > MOST_F16:
            raise UserError(f"{name} has weights beyond the range of F16: use --format hf")
        yield name, gguf.quants.quantize(value.contiguous().numpy(), kind), kind


class _Llama:
    """An exported file in llama.cpp, through llama-cpp-python, on the CPU."""

    def __init__(self, folder: Path) -> None:
        library = require("llama_cpp", LlamaCpp.install)
        self.label = f"llama-cpp-python {library.__version__}"
        path = next(iter(sorted(folder.glob("model-*.gguf"))), None)
        if path is None:
            raise UserError(f"{folder} has no model-*.gguf: export the run again")
        try:
            # A context of 0 is the model's own. F32 for keys and values, which it rounds to F16 by default.
            f32 = library.GGML_TYPE_F32
            self._model = library.Llama(
                str(path),
                n_ctx=0,
                n_gpu_layers=0,
                logits_all=True,
                type_k=f32,
                type_v=f32,
                verbose=False,
            )
        except ValueError as error:
            raise UserError(f"{self.label} does not open {path}: {error}") from error

    def encode(self, text: str) -> list[int]:
        return list(self._model.tokenize(text.encode(), add_bos=True, special=False))

    def logits(self, ids: list[int]) -> Tensor:
        self._model.reset()
        self._model.eval(ids)
        return torch.from_numpy(self._model.scores[: len(ids)].copy()).float()

    def greedy(self, ids: list[int], count: int) -> list[int]:
        tokens: list[int] = []
        self._model.reset()
        self._model.eval(ids)
        while True:
            scores = self._model.scores[self._model.n_tokens - 1]
            tokens.append(int(scores.argmax()))
            if len(tokens) == count or tokens[-1] == self._model.token_eos():
                return tokens
            self._model.eval(tokens[-1:])


EXPORTER = LlamaCpp()
