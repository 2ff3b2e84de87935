"""``storylab info``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET

from storylab.cli.arguments import AsJson, OptionalRunFolder
from storylab.cli.documents import print_document
from storylab.cli.registry import Call, Verb
from storylab.config import DEFAULT_PRESET, PRESETS, ModelConfig, PresetName, parse_attention
from storylab.documents.info import CheckEntry, InfoDocument, StageEntry
from storylab.errors import UserError
from storylab.flags import default_for, given_flags, vocab_size_or

if TYPE_CHECKING:
    from storylab.record.schema import Stage, Summary


@dataclass(frozen=True)
class InfoCommand:
    """Print the shape and the parameter count of a model, or of a run and its checks.

    Examples: storylab info | storylab info --preset 113m | storylab info --preset 10m --n_layer 6
    | storylab info runs/a
    """

    run: OptionalRunFolder = None
    """Run folder, instead of the flags of a model; also prints the checks before its first step."""

    preset: PresetName = DEFAULT_PRESET
    """Named model shape; the shape flags override single values of it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    vocab_size: int = 0
    """Vocabulary size to count with; 0: the one that the preset's name assumes."""
    json: AsJson = False


def run(call: Call) -> int:
    """Print shape and parameter count."""
    preset = default_for(call.args)
    command = call.parse(InfoCommand, InfoCommand(preset=preset.preset, model=preset.model))
    if command.run is not None:
        flags = [name for name in given_flags(call.args) if name != "json"]
        if flags:
            raise UserError(
                f"--{flags[0]} is for a model: leave it out, or leave {command.run} out"
            )
        document = _document_of_run(command.run)
    else:
        document = _document(command.preset, command.model, command.vocab_size)
    if command.json:
        print_document(lambda: document)
        return 0
    for name, value in document.model.items():
        print(f"{name:<12} {value if isinstance(value, str) else f'{value:,}'}")
    print(f"{'head size':<12} {document.head_size}")
    patterns = parse_attention(str(document.model["attention"]))
    layers = range(int(document.model["n_layer"]))
    windows = ", ".join(patterns[layer % len(patterns)].short for layer in layers)
    print(
        f"{'windows':<12} {windows} (receptive field: {document.receptive_field_tokens or 'all'})"
    )
    print(f"{'vocabulary':<12} {document.vocab_size:,}")
    print(f"{document.parameters:,} parameters")
    from storylab.cli.tables import print_lines

    if document.on_divergence is not None:
        print(f"{'divergence':<12} {document.on_divergence}")
    print_lines(*document.recoveries)
    for stage in document.stages:
        print_lines(*_stage_lines(stage))
    return 0


def _stage_lines(stage: StageEntry) -> Iterator[str]:
    """The checks of a stage in words."""
    name = f"checks before iteration {stage.iteration}"
    if stage.skipped is None:
        yield f"{name}: not recorded (by an earlier version of storylab)"
    elif stage.skipped:
        yield f"{name}: skipped (--skip_checks)"
    else:
        yield f"{name}: {stage.seconds:.1f} s"
        for check in stage.checks:
            yield f"  {check.name:<18} {'passed' if check.passed else 'FAILED'}: {check.finding}"


def _document_of_run(folder: Path) -> InfoDocument:
    """Shape, parameter count and checks of a run.

    Raises:
        UserError: there is no run, or its files are damaged.
    """
    from storylab.record.folder import open_run

    run = open_run(folder)
    config, environment = run.read_config(), run.read_environment()
    vocab_size, summary = run.read_data().tokenizer.vocab_size, run.read_summary()
    stages = [(0, environment), *((stage.iteration, stage) for stage in environment.resumed)]
    return msgspec.structs.replace(
        _document(config.preset, config.model, vocab_size),
        run=str(folder),
        stages=[_stage(iteration, stage) for iteration, stage in stages],
        on_divergence=config.on_divergence,
        recoveries=[] if summary is None else _recoveries(summary),
    )


def _recoveries(summary: Summary) -> list[str]:
    """The places where a run that has ended would have diverged, in words."""
    from storylab.training.log_format import rewind_line

    count = summary.skipped_steps
    skipped = [f"{count} step{'s' * (count > 1)} skipped: loss or gradients were not finite"]
    return skipped * (count > 0) + [rewind_line(rewind) for rewind in summary.rewinds]


def _stage(iteration: int, stage: Stage) -> StageEntry:
    if stage.checks is UNSET:
        return StageEntry(iteration=iteration, skipped=None, seconds=None, checks=[])
    return StageEntry(
        iteration=iteration,
        skipped=stage.checks.skipped,
        seconds=stage.checks.seconds,
        checks=[CheckEntry(**msgspec.structs.asdict(check)) for check in stage.checks.results],
    )


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
        run=None,
        stages=[],
        on_divergence=None,
        recoveries=[],
    )


VERB = Verb(
    "info",
    "print shape and parameter count of a model or run",
    "runs",
    run,
    InfoCommand,
    position=6,
)
