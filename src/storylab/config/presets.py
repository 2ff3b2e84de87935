"""Named model shapes and named ways of training: data, found by name; configs as the flags that differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from storylab.config.identity import flat
from storylab.config.model import ModelConfig
from storylab.config.train import MethodName, PresetName, TrainConfig
from storylab.errors import UserError

Name = TypeVar("Name", bound=str)

GPT2_VOCAB_SIZE = 50257
SMALL_VOCAB_SIZE = 4096


@dataclass(frozen=True)
class Preset:
    """A named model shape and the vocabulary with which it has the parameters that its name says."""

    model: ModelConfig
    vocab_size: int


# Head size 64 throughout, and four query heads to one key/value head, as in the original log, where
# the head count allows it. Below 50M a 50,257-word vocabulary would leave hardly anything for the
# blocks, so these shapes are counted with a 4,096-token vocabulary (`prepare --tokenizer
# bpe:4096`).
PRESETS: dict[PresetName, Preset] = {
    "nano": Preset(ModelConfig(3, 2, 1, 128, 288), SMALL_VOCAB_SIZE),
    "3m": Preset(ModelConfig(6, 3, 1, 192, 480), SMALL_VOCAB_SIZE),
    "6m": Preset(ModelConfig(7, 4, 1, 256, 704), SMALL_VOCAB_SIZE),
    "10m": Preset(ModelConfig(12, 4, 1, 256, 768), SMALL_VOCAB_SIZE),
    "50m": Preset(ModelConfig(8, 8, 2, 512, 1536), GPT2_VOCAB_SIZE),
    "113m": Preset(ModelConfig(12, 12, 3, 768, 2048), GPT2_VOCAB_SIZE),
    "200m": Preset(ModelConfig(14, 16, 4, 1024, 2560), GPT2_VOCAB_SIZE),
    "350m": Preset(ModelConfig(27, 16, 4, 1024, 2752), GPT2_VOCAB_SIZE),
}
_FAST_TRAINING: dict[str, Any] = {
    "optimizer": "normuon",
    "muon_lr": 0.02,
    "learning_rate": 4e-2,
    "min_lr": 8e-3,
    "warmup_iters": 20,
    "schedule": "linear",
    "beta2": 0.95,
    "ema_fraction": 0.1,
}
_PORTABLE_MODEL: dict[str, Any] = {"qk_norm": True}
# Named ways of training: the changes that each makes to that of the original log. Every part of
# `fast` has been compared with runs without it (docs/time-to-loss.md). `portable` has the parts of it that
# a model class of other programs has (storylab.export.classes).
METHODS: dict[MethodName, dict[str, Any]] = {
    "record": {},
    "fast": {
        **_FAST_TRAINING,
        "model": {
            **_PORTABLE_MODEL,
            "value_residual": "first_layer",
            "embedding_residual": True,
        },
    },
    "portable": {**_FAST_TRAINING, "model": _PORTABLE_MODEL},
}


def preset_config(name: str, method: str = "record") -> TrainConfig:
    """The default run with the model shape of preset ``name``, trained by ``method``.

    Raises:
        UserError: no preset or method has that name.
    """
    preset = _named(PRESETS, name, "preset")
    chosen = _named(METHODS, method, "method")
    changes = dict(METHODS[chosen])
    model = dataclasses.replace(PRESETS[preset].model, **changes.pop("model", {}))
    return TrainConfig(preset=preset, method=chosen, model=model, **changes)


def flags_of(config: TrainConfig, without: Collection[str] = ()) -> list[str]:
    """The words after ``storylab train`` that make ``config``, to be joined for a shell.

    They name preset, method and dtype, and every other field that differs from the default of that preset
    and method; fields called ``without`` are left out.
    """
    default = flat(preset_config(config.preset, config.method))
    words = ["--preset", config.preset]
    if config.method != "record":
        words += ["--method", config.method]
    for name, value in flat(config, {*without, "preset", "method"}).items():
        if value == default[name] and name != "dtype":
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no_'}{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def _named(table: dict[Name, Any], name: str, kind: str) -> Name:
    for key in table:
        if key == name:
            return key
    raise UserError(f"unknown {kind} '{name}': choose one of {', '.join(table)}")
