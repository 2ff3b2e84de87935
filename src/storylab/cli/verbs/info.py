"""``storylab info``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from storylab.cli.registry import Call, Verb
from storylab.config import DEFAULT_PRESET, PRESETS, ModelConfig, PresetName
from storylab.flags import default_for, vocab_size_or


@dataclass(frozen=True)
class InfoCommand:
    """Print the shape and the parameter count of a model.

    Examples: storylab info | storylab info --preset 113m | storylab info --preset 10m --n_layer 6
    """

    preset: PresetName = DEFAULT_PRESET
    """Named model shape; the shape flags override single values of it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    vocab_size: int = 0
    """Vocabulary size to count with; 0: the one that the preset's name assumes."""


def run(call: Call) -> int:
    """Print shape and parameter count."""
    preset = default_for(call.args)
    command = call.parse(InfoCommand, InfoCommand(preset.preset, preset.model))
    model = command.model
    vocab_size = vocab_size_or(command.vocab_size, PRESETS[command.preset].vocab_size)
    for f in dataclasses.fields(model):
        value = getattr(model, f.name)
        print(f"{f.name:<12} {value if isinstance(value, str) else f'{value:,}'}")
    print(f"{'head size':<12} {model.head_size}")
    windows = ", ".join(pattern.short for pattern in model.layer_patterns)
    print(f"{'windows':<12} {windows} (receptive field: {model.receptive_field or 'all'})")
    print(f"{'vocabulary':<12} {vocab_size:,}")
    print(f"{model.parameter_count(vocab_size):,} parameters")
    return 0


VERB = Verb("info", "print shape and parameter count of a model", "runs", run, position=6)
