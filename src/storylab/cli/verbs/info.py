"""``storylab info``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from storylab.cli.arguments import AsJson
from storylab.cli.documents import print_document
from storylab.cli.registry import Call, Verb
from storylab.config import DEFAULT_PRESET, PRESETS, ModelConfig, PresetName
from storylab.documents.info import InfoDocument
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
    json: AsJson = False


def run(call: Call) -> int:
    """Print shape and parameter count."""
    preset = default_for(call.args)
    command = call.parse(InfoCommand, InfoCommand(preset.preset, preset.model))
    document = _document(command.preset, command.model, command.vocab_size)
    if command.json:
        print_document(lambda: document)
        return 0
    for name, value in document.model.items():
        print(f"{name:<12} {value if isinstance(value, str) else f'{value:,}'}")
    print(f"{'head size':<12} {document.head_size}")
    windows = ", ".join(pattern.short for pattern in command.model.layer_patterns)
    print(
        f"{'windows':<12} {windows} (receptive field: {document.receptive_field_tokens or 'all'})"
    )
    print(f"{'vocabulary':<12} {document.vocab_size:,}")
    print(f"{document.parameters:,} parameters")
    return 0


def _document(preset: PresetName, model: ModelConfig, vocab_size: int) -> InfoDocument:
    """Shape and parameter count; a ``vocab_size`` of 0 is the preset's."""
    vocab_size = vocab_size_or(vocab_size, PRESETS[preset].vocab_size)
    return InfoDocument(
        preset=preset,
        model=dataclasses.asdict(model),
        head_size=model.head_size,
        reach_tokens=[pattern.reach for pattern in model.layer_patterns],
        receptive_field_tokens=model.receptive_field,
        vocab_size=vocab_size,
        parameters=model.parameter_count(vocab_size),
    )


VERB = Verb("info", "print shape and parameter count of a model", "runs", run, position=6)
