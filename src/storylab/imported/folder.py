"""The folder of an imported model: written once, whole or not at all, and read.

It holds ``storylab_model.json`` (the record), ``model.safetensors`` (the weights in the source's dtype, by
the names of `transformers`), the source's tokenizer file, and ``SHA256SUMS`` of all three.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

import storylab
from storylab.checksums import CHECKSUMS, add_checksums, altered, read_checksums, sha256_file
from storylab.errors import UserError
from storylab.export.exporter import save_tensors
from storylab.files import exists, open_file, read_record, reading, shown, write_json
from storylab.folders import whole_folder
from storylab.imported import READERS, RECORD, find_reader, is_imported
from storylab.imported.json_tokenizer import JsonTokenizer, read_json_tokenizer
from storylab.imported.model import ImportedModel
from storylab.imported.score_tokenizer import ScoreTokenizer, read_score_tokenizer
from storylab.imported.shape import ImportedShape
from storylab.imported.tensors import WEIGHTS, load_tensors
from storylab.record.folder import open_run
from storylab.training.precision import choose_device, high_precision
from storylab.training.sampling import StoryModel, load_story_model

ImportedTokenizer = JsonTokenizer | ScoreTokenizer
# The readers of tokenizers in model folders, by the name of their file.
TOKENIZERS: dict[str, Callable[[bytes, Path, int, int, int], ImportedTokenizer]] = {
    "tokenizer.json": read_json_tokenizer,
    "tokenizer.bin": read_score_tokenizer,
}
# Caches hold the whole context, and some models were made to read 100,000 tokens.
LONGEST_CONTEXT = 4096


class ModelRecord(Struct, frozen=True, kw_only=True):
    """``storylab_model.json``: an imported model and where it comes from."""

    source: str
    """The path that was imported, as it was given."""
    kind: str
    """The kind of source, one of :data:`~storylab.imported.READERS`."""
    architecture: str
    """The class that computes it, in the words of its source."""
    files: dict[str, str]
    """SHA-256 of each file of the source that was read, by name."""
    imported: str
    """Time of the import."""
    storylab: str
    """Version of storylab that wrote it."""
    shape: ImportedShape
    parameters: int
    """Number of weights; those of a tied head count once."""
    tokenizer: str
    """Name of the tokenizer's file."""
    begin_of_text: int
    """Id before a story."""
    end_of_text: int
    """Id after a story."""


def import_model(
    source: Path,
    out: Path,
    tokenizer: Path | None = None,
    begin: int | None = None,
    end: int | None = None,
) -> ModelRecord:
    """Import a model into ``out``, which appears when it is complete.

    Args:
        source: a folder of `transformers`, or a ``.bin`` file of llama2.c.
        out: the folder to write; missing or empty.
        tokenizer: the tokenizer's file, where it is not next to the weights.
        begin: id before a story; by default the source's own rule.
        end: id after a story, in the same way.

    Raises:
        UserError: the source cannot be read or cannot be computed exactly, or ``out`` has files.
    """
    with reading(out):
        if exists(out) and (not out.is_dir() or any(out.iterdir())):
            raise UserError(
                f"{shown(out)} exists and is not an empty folder: choose another --out_dir"
            )
    with reading(source):
        kind = "hf" if source.is_dir() else "llama2c"
    found = find_reader(kind)(source, tokenizer)
    begin = found.begin_of_text if begin is None else begin
    end = found.end_of_text if end is None else end
    for name, number in (("begin", begin), ("end", end)):
        if not 0 <= number < found.shape.vocab_size:
            raise UserError(
                f"the id {number} of the {name} of a text is outside the vocabulary of "
                f"{found.shape.vocab_size}: give another with --{name}_id"
            )
    record = ModelRecord(
        source=str(source),
        kind=kind,
        architecture=found.architecture,
        files={path.name: sha256_file(path) for path in found.files},
        imported=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        storylab=storylab.__version__,
        shape=found.shape,
        parameters=sum(value.numel() for value in found.weights.values()),
        tokenizer=found.tokenizer_file,
        begin_of_text=begin,
        end_of_text=end,
    )
    with whole_folder(out.resolve()) as partial:
        save_tensors(found.weights, partial / WEIGHTS)
        (partial / found.tokenizer_file).write_bytes(found.tokenizer)
        write_json(partial / RECORD, msgspec.to_builtins(record))
        add_checksums(partial, (WEIGHTS, found.tokenizer_file, RECORD))
    return record


def read_model_record(folder: Path) -> ModelRecord:
    """Read the record of the imported model in ``folder``.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / RECORD
    if not exists(path):
        raise UserError(
            f"{shown(folder)} holds no imported model (it has no {RECORD}): check the path"
        )
    sums = read_checksums(folder)
    record = read_record(path, ModelRecord, lambda data: sums.require(RECORD, data))
    ids = (record.begin_of_text, record.end_of_text)
    if (
        record.tokenizer not in TOKENIZERS
        or record.kind not in READERS
        or not all(0 <= number < record.shape.vocab_size for number in ids)
    ):
        raise UserError(f"{shown(path)} is of a later version of storylab, or damaged")
    return record


def load_imported(folder: Path, device: str = "auto") -> tuple[StoryModel, ImportedTokenizer]:
    """The imported model in ``folder``, computed in float32, and its tokenizer.

    It reads at most 4,096 tokens at once, fewer if it was made for fewer.

    Raises:
        UserError: there is none, a file is missing or altered, or there is no such device.
    """
    record = read_model_record(folder)
    precision = high_precision(choose_device(device), "float32")
    _require_unaltered(folder, record)
    weights = load_tensors([folder / WEIGHTS], record.shape.tensors())
    model = ImportedModel(record.shape, weights)
    context, tokenizer = min(record.shape.context, LONGEST_CONTEXT), _tokenizer(folder, record)
    return StoryModel(model.to(precision.device), tokenizer, context, precision), tokenizer


def open_story_model(folder: Path, checkpoint: str = "last", device: str = "auto") -> StoryModel:
    """The model of a run or an imported model.

    Args:
        folder: of either kind.
        checkpoint: of a run, ``last`` or ``best``; an imported model has one set of weights.
        device: where to compute.

    Raises:
        UserError: ``folder`` holds neither, its weights are missing or altered, or there is no such device.
    """
    if not is_imported(folder):
        return load_story_model(open_run(folder), checkpoint, device)
    if checkpoint != "last":
        raise UserError(
            f"{shown(folder)} is an imported model, which has no {checkpoint} checkpoint"
        )
    return load_imported(folder, device)[0]


def _require_unaltered(folder: Path, record: ModelRecord) -> None:
    sums: Mapping[str, str] = read_checksums(folder).sums
    for name in (WEIGHTS, record.tokenizer):
        if name not in sums:
            raise UserError(
                f"{shown(folder)} has no checksum of {name} in {CHECKSUMS}: import it again"
            )
        if sha256_file(folder / name) != sums[name]:
            raise altered(folder / name)


def _tokenizer(folder: Path, record: ModelRecord) -> ImportedTokenizer:
    path = folder / record.tokenizer
    with open_file(path) as file:
        data = file.read()
    read = TOKENIZERS[record.tokenizer]
    return read(data, path, record.shape.vocab_size, record.begin_of_text, record.end_of_text)
