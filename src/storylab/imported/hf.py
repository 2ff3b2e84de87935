"""Folders of Hugging Face's `transformers`: config.json, tokenizer.json and safetensors; no code of theirs.

A field of the config that changes the computation in a way that :class:`ImportedShape` has no place
for is refused by name and value. Sources of the rules: ``configuration_*.py`` and ``modeling_*.py`` of
each class in `transformers` 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from msgspec import Struct

from storylab.decode import convert
from storylab.decode import shown as shortened
from storylab.errors import UserError
from storylab.files import exists, open_file, read_json, shown
from storylab.imported.json_tokenizer import JsonTokenizer, added_ids, read_json_tokenizer
from storylab.imported.shape import EMBEDDING, HEAD, ImportedShape
from storylab.imported.source import Source, require_finite
from storylab.imported.tensors import load_tensors, tensor_names, weight_files

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
DEFAULT_ROPE_BASE = 10000.0


class Config(Struct, frozen=True, kw_only=True):
    """``config.json``, the fields that decide the computation. Those without a default are in every file
    that `transformers` writes for these classes."""

    architectures: list[str]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int | None = None
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


# Fields with the values that change nothing; anything else is refused. A missing field changes nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "auto_map": (None,),
}


def read(folder: Path, tokenizer: Path | None = None) -> Source:
    """Read the model in ``folder``.

    Args:
        folder: has config.json, the safetensors and tokenizer.json.
        tokenizer: another tokenizer.json, or its folder.

    Raises:
        UserError: a file is missing or damaged, or the model is one that cannot be computed exactly here.
    """
    config, shape = read_config(folder / CONFIG)
    files = weight_files(folder)
    expected = shape.tensors()
    if shape.tied_head and HEAD in tensor_names(files):
        expected[HEAD] = expected[EMBEDDING]  # some programs save it although it is tied
    weights = load_tensors(files, expected)
    if (
        shape.tied_head
        and HEAD in weights
        and not torch.equal(weights.pop(HEAD), weights[EMBEDDING])
    ):
        raise UserError(
            f"{shown(folder / CONFIG)}: tie_word_embeddings is true, and {HEAD} is not the embedding"
        )
    require_finite(weights, folder)
    place = tokenizer or folder
    place = place / TOKENIZER if place.is_dir() else place
    data = _tokenizer_bytes(place)
    read_tokenizer = read_json_tokenizer(data, place, shape.vocab_size, 0, 0)
    begin, end = _boundaries(config, read_tokenizer, place)
    return Source(
        architecture=config.architectures[0],
        shape=shape,
        weights=weights,
        tokenizer_file=TOKENIZER,
        tokenizer=data,
        begin_of_text=begin,
        end_of_text=end,
        files=(folder / CONFIG, *files, place),
    )


def read_config(path: Path) -> tuple[Config, ImportedShape]:
    """Read ``config.json``.

    Raises:
        UserError: it is missing or damaged, or has a field that changes the computation.
    """
    values = read_json(path)
    names = values.get("architectures") if isinstance(values, dict) else None
    # In a list of the classes: what a file has may have no hash.
    if not isinstance(names, list) or len(names) != 1 or names[0] not in [*CLASSES]:
        raise UserError(
            f"{shown(path)}: architectures is {shortened(names)}: storylab reads {', '.join(CLASSES)}"
        )
    for name, allowed in NEUTRAL.items():
        if name in values and values[name] not in allowed:
            raise UserError(
                f"{shown(path)}: {name} is {shortened(values[name])}: storylab computes such models with "
                f"{' or '.join(map(repr, allowed))} alone"
            )
    config = convert(Config, values, str(path))
    try:
        return config, _shape(config, values)
    except UserError as error:
        raise UserError(f"{shown(path)}: {error}") from error


def _shape(config: Config, values: Mapping[str, Any]) -> ImportedShape:
    kind = config.architectures[0]
    if (
        kind != "LlamaForCausalLM"
    ):  # the defaults of the others differ, and no file leaves these out
        for name in ("num_key_value_heads", *(["head_dim"] if kind == "Qwen3ForCausalLM" else [])):
            if name not in values:
                raise UserError(f"{name}: is missing")
    heads = config.num_attention_heads
    if config.head_dim is None and (heads < 1 or config.hidden_size % heads):
        raise UserError(
            f"hidden_size is {config.hidden_size}, not a multiple of num_attention_heads {heads}"
        )
    return ImportedShape(
        vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers,
        n_head=heads,
        n_kv_head=heads if config.num_key_value_heads is None else config.num_key_value_heads,
        head_size=config.hidden_size // heads if config.head_dim is None else config.head_dim,
        n_embd=config.hidden_size,
        n_hidden=config.intermediate_size,
        context=config.max_position_embeddings,
        rope_base=_rope_base(config, values),
        norm_epsilon=config.rms_norm_eps,
        tied_head=config.tie_word_embeddings,
        qk_norm=kind == "Qwen3ForCausalLM",
        windows=CLASSES[kind](config, values),
    )


def _rope_base(config: Config, values: Mapping[str, Any]) -> float:
    """The base of the rotary positions, from the field of `transformers` 5 or that of earlier versions."""
    parameters = config.rope_parameters or {}
    if (kind := parameters.get("rope_type", "default")) != "default":
        raise UserError(
            f"rope_parameters.rope_type is {shortened(kind)}: storylab has default alone"
        )
    if extra := sorted(parameters.keys() - {"rope_type", "rope_theta"}):
        value = parameters[extra[0]]
        raise UserError(
            f"rope_parameters.{extra[0]} is {shortened(value)}: storylab has no such field"
        )
    named = (parameters.get("rope_theta"), config.rope_theta)
    bases = [base for base in named if base is not None]
    if len(bases) > 1 and bases[0] != bases[1]:
        raise UserError(f"rope_theta is {config.rope_theta}, and another in rope_parameters")
    if not bases and config.architectures[0] == "CwmForCausalLM":
        raise UserError("rope_parameters: is missing")  # its default has a scaling
    base = bases[0] if bases else DEFAULT_ROPE_BASE
    if isinstance(base, bool) or not isinstance(base, int | float):
        raise UserError(f"rope_parameters.rope_theta is {shortened(base)}: it must be a number")
    return float(base)


Windows = tuple[int | None, ...]


def _no_windows(config: Config, values: Mapping[str, Any]) -> Windows:
    if config.layer_types is not None or config.sliding_window is not None:
        raise UserError("sliding_window: LlamaForCausalLM has no windows")
    return ()


def _one_window(config: Config, values: Mapping[str, Any]) -> Windows:
    """Mistral: one window in all layers, or none."""
    if "sliding_window" not in values:
        raise UserError("sliding_window: is missing")  # its default is no null
    if config.layer_types is not None:
        raise UserError("layer_types: MistralForCausalLM has one kind of layer")
    return () if config.sliding_window is None else (config.sliding_window,) * _layers(config)


def _cwm_windows(config: Config, values: Mapping[str, Any]) -> Windows:
    if config.layer_types is None:
        raise UserError("layer_types: is missing")
    return _typed_windows(config)


def _qwen3_windows(config: Config, values: Mapping[str, Any]) -> Windows:
    """Qwen3: windows with use_sliding_window alone, by layer_types, else from max_window_layers on."""
    if not config.use_sliding_window:
        if config.layer_types and "sliding_attention" in config.layer_types:
            raise UserError("layer_types has sliding_attention, and use_sliding_window is not true")
        return ()
    if config.layer_types is not None:
        return _typed_windows(config)
    if config.max_window_layers is None or "sliding_window" not in values:
        raise UserError("max_window_layers or sliding_window: is missing")
    layers, first = _layers(config), config.max_window_layers
    return tuple(config.sliding_window if layer >= first else None for layer in range(layers))


def _typed_windows(config: Config) -> Windows:
    types, size = config.layer_types or [], config.sliding_window
    if "sliding_attention" in types and size is None:
        raise UserError("sliding_window: is missing")
    return tuple(size if kind == "sliding_attention" else None for kind in types)


def _layers(config: Config) -> int:
    """Number of layers, for lists of them; a number out of range gets a list of none, and is refused."""
    return config.num_hidden_layers if 0 < config.num_hidden_layers <= 10_000 else 0


# The classes that are read, and the windows that their layers have by the config.
CLASSES: Mapping[str, Callable[[Config, Mapping[str, Any]], Windows]] = {
    "LlamaForCausalLM": _no_windows,
    "MistralForCausalLM": _one_window,
    "CwmForCausalLM": _cwm_windows,
    "Qwen3ForCausalLM": _qwen3_windows,
}


def _tokenizer_bytes(path: Path) -> bytes:
    if not exists(path):
        raise UserError(
            f"{shown(path)} is missing: storylab reads no other form of tokenizer (AutoTokenizer of "
            "transformers reads most, and its save_pretrained writes this one)"
        )
    with open_file(path) as file:
        return file.read()


def _boundaries(config: Config, tokenizer: JsonTokenizer, place: Path) -> tuple[int, int]:
    """The ids before and after a story.

    A story begins with the id that the tokenizer puts before a text. Without one it begins as the
    next story in training does, after the end of another.

    Raises:
        UserError: the config names no end, or the tokenizer puts several ids around a text.
    """
    end = config.eos_token_id
    end = end[0] if isinstance(end, list) and end else end
    if not isinstance(end, int):
        raise UserError(f"{CONFIG}: eos_token_id is {shortened(end)}: a story needs an end")
    before, _ = added_ids(tokenizer, place)
    if len(before) > 1:
        raise UserError(f"{shown(place)}: post_processor puts {len(before)} ids before a text")
    if before:
        return before[0], end
    path = place.with_name(TOKENIZER_CONFIG)
    options = read_json(path) if exists(path) else {}
    if isinstance(options, dict) and options.get("add_bos_token") is True:
        if config.bos_token_id is None:
            raise UserError(
                f"{shown(path)}: add_bos_token is true, and config.json has no bos_token_id"
            )
        return config.bos_token_id, end
    return end, end
