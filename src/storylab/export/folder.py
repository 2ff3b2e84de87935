"""Write an export whole or not at all, and verify one anywhere."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

import storylab
from storylab.checksums import sha256_file
from storylab.errors import UserError
from storylab.export import EXPORTERS, find_exporter
from storylab.export.card import CARD, model_card
from storylab.export.exporter import Exporter, Source, installed, load_weights
from storylab.export.reference import (
    Agreement,
    Prompt,
    compare,
    load_reference,
    make_reference,
    save_reference,
)
from storylab.files import (
    exists,
    read_record,
    reading,
    shown,
    write_json,
    write_text,
)
from storylab.folders import whole_folder
from storylab.record.checkpoint import weights_sha256
from storylab.record.folder import open_run
from storylab.record.run import load_run

RECORD = "storylab_export.json"


class ExportRecord(Struct, frozen=True, kw_only=True):
    """``storylab_export.json``: where an export comes from, and what is in it."""

    format: str
    weights: str
    """Type of the weights in the files."""
    model_class: str
    storylab: str
    """Version of storylab that wrote it."""
    run: str
    """Name of the run's folder."""
    checkpoint: str
    weights_sha256: str
    """SHA-256 of the exported weights by our names, in float32, before the format rounds them."""
    data_fingerprint: str
    prompts: list[str]
    """Texts of the prompts of the self-check."""
    findings: list[str]
    """The self-check at the end of the export, a line each."""
    files: dict[str, str]
    """SHA-256 of each other file."""


def export_run(
    folder: Path, format_name: str, weights: str | None, checkpoint: str, out: Path
) -> ExportRecord:
    """Export the model of a run; ``out`` appears when it is complete and checked.

    Args:
        folder: the run folder.
        format_name: one of :data:`~storylab.export.EXPORTERS`, with ``weights`` of a type that it has, or
            None for its first.
        checkpoint: ``best`` or ``last``.
        out: the folder to write; an earlier export in it is replaced.

    Raises:
        UserError: the format cannot hold the model, the run has no such checkpoint, ``out`` has something
            else in it, a package is missing, or the check found a difference.
    """
    exporter, weights = _chosen(format_name, weights)
    config = open_run(folder).read_config()
    exporter.refuse(config.model, config.block_size, weights)
    _require_own(out.resolve())
    source = load_weights(load_run(folder), checkpoint)
    with whole_folder(out.resolve(), replace=True) as partial:
        exporter.write(source, weights, partial)
        written = exporter.as_written(source, weights)
        prompts = make_reference(written, source.tokenizer, source.block_size)
        save_reference(prompts, partial)
        findings = _findings(exporter, source, weights, prompts, partial)
        write_text(partial / CARD, model_card(source, exporter, weights, findings))
        record = ExportRecord(
            format=format_name,
            weights=weights,
            model_class=exporter.class_name(source.config),
            storylab=storylab.__version__,
            run=folder.resolve().name,
            checkpoint=checkpoint,
            weights_sha256=weights_sha256(source.weights),
            data_fingerprint=source.run.data.fingerprint,
            prompts=[prompt.text for prompt in prompts],
            findings=findings,
            files={path.name: sha256_file(path) for path in sorted(partial.iterdir())},
        )
        write_json(partial / RECORD, msgspec.to_builtins(record))
    return record


def _chosen(format_name: str, weights: str | None) -> tuple[Exporter, str]:
    """A format, and a type of weights that it has."""
    exporter = find_exporter(format_name)
    weights = weights or exporter.weights[0]
    if weights not in exporter.weights:
        known = ", ".join(exporter.weights)
        raise UserError(f"--format {format_name} has no weights of type {weights}: use {known}")
    return exporter, weights


def _findings(
    exporter: Exporter, source: Source, weights: str, prompts: list[Prompt], folder: Path
) -> list[str]:
    """Check the written files; the findings, a line each."""
    lines = [exporter.read_back(source, weights, folder)]
    if installed(exporter.program):
        reader = exporter.open(folder)
        found = compare(reader, prompts, exporter.tolerances[weights])
        return [*lines, _agreement_line(reader.label, found)]
    return [
        *lines,
        f"not run in {exporter.program}, which is not installed here ({exporter.install}); "
        "`storylab export --verify FOLDER` does it where it is",
    ]


def _agreement_line(program: str, found: Agreement) -> str:
    lengths = ", ".join(map(str, found.lengths))
    return (
        f"{program} agrees with storylab on prompts of {lengths} tokens: logits within "
        f"{found.difference:.1e} of the largest, {found.tokens} greedy tokens equal"
    )


def verify_export(folder: Path) -> list[str]:
    """Check an export: its files against their hashes, and its reference in the program it is for.

    The model card may have been edited, and other files may lie next to the export.

    Returns:
        the findings, a line each.

    Raises:
        UserError: there is no export, a file is missing or altered, the program is not installed, or its
            results differ from our model's.
    """
    record = read_export(folder)
    require_unaltered(folder, record)
    exporter = find_exporter(record.format)
    if record.weights not in exporter.tolerances:
        raise UserError(
            f"{shown(folder / RECORD)}: weights: {record.weights} is no type of weights"
        )
    prompts = load_reference(record.prompts, folder)
    reader = exporter.open(folder)
    found = compare(reader, prompts, exporter.tolerances[record.weights])
    return [
        f"{len(record.files)} files have the hashes of the export",
        _agreement_line(reader.label, found),
    ]


def require_unaltered(folder: Path, record: ExportRecord) -> None:
    """Compare the files of an export with their hashes; the model card may have been edited.

    Raises:
        UserError: a file is missing or altered.
    """
    for name, expected in record.files.items():
        if name != CARD and sha256_file(folder / name) != expected:
            raise UserError(
                f"{shown(folder / name)} has been altered (its SHA-256 differs): export the run again"
            )


def read_export(folder: Path) -> ExportRecord:
    """Read the record of the export in ``folder``.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / RECORD
    if not exists(path):
        raise UserError(f"{shown(folder)} is not an export (it has no {RECORD}): check the path")
    record = read_record(path, ExportRecord)
    if record.format not in EXPORTERS:
        raise UserError(f"{shown(path)}: format: {record.format} is not one of this version")
    if odd := [name for name in record.files if Path(name).name != name]:
        raise UserError(f"{shown(path)}: files: {shown(odd[0])} is not the name of a file here")
    return record


def _require_own(out: Path) -> None:
    """Raise a UserError unless ``out`` is missing, empty, or an unchanged export."""
    if not exists(out):
        return
    with reading(out):
        if not out.is_dir():
            raise UserError(f"{shown(out)} is a file: choose another folder with --out")
        if out.samefile(Path()):
            raise UserError("the export needs a folder for itself: choose one with --out")
        names = {path.name for path in out.iterdir()}
    if not names:
        return
    other = "choose another folder with --out"
    if RECORD not in names:
        raise UserError(f"{shown(out)} has files in it and is not an export: {other}")
    files = read_export(out).files
    if extra := sorted(names - files.keys() - {RECORD}):
        raise UserError(f"{shown(out)} holds {shown(extra[0])}, which no export wrote: {other}")
    for name in sorted(names & files.keys()):
        if sha256_file(out / name) != files[name]:
            raise UserError(f"{shown(out / name)} has been changed since its export: {other}")
