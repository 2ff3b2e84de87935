"""Begin a run folder, continue it, and end it, so that at every moment its files and checksums agree.

Files that are written once have a checksum from the start. Rows and log grow: the checkpoint that
belongs to them records how long they were and their checksum up to there (:class:`Prefix`). When a run
ends, all its files have one. A file loses its checksum before it is changed, so that a kill in between
leaves a folder that can be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from storylab import config as configs
from storylab.checksums import (
    CHECKSUMS,
    add_checksums,
    altered,
    drop_checksums,
    read_checksums,
    sha256_file,
    write_checksums,
)
from storylab.config import TrainConfig
from storylab.data.dataset import TOKENIZER_FILE, Dataset
from storylab.errors import UserError
from storylab.files import (
    atomic_path,
    exists,
    open_file,
    read_json,
    reading,
    write_error,
    write_json,
)
from storylab.record.folder import (
    CONFIG,
    DATA,
    ENVIRONMENT,
    LOG,
    METRICS,
    POSITION_LOSSES,
    PRECISION,
    STORY_LOSSES,
    SUMMARY,
    TEST_LOSSES,
    RunFolder,
    rows_with_lines,
)
from storylab.record.provenance import current_stage
from storylab.record.schema import Environment, Resumption, Summary

# Written once at the start; a later stage rewrites all but the first two.
START = (TOKENIZER_FILE, DATA, ENVIRONMENT, CONFIG)
LASTING = START[:2]
GROWING = (METRICS, LOG)
CHECKPOINTS = "checkpoints"


def create_run(config: TrainConfig, dataset: Dataset, identity: Mapping[str, Any]) -> RunFolder:
    """Make the folder ``config.out_dir`` and write everything known before the first iteration.

    Args:
        config: the resolved config.
        dataset: the data set to train on.
        identity: the fields of :class:`~storylab.record.schema.Environment` that a
            :class:`~storylab.record.schema.Stage` lacks, and the results of the checks.

    Raises:
        UserError: the folder has something in it already, or cannot be written.
    """
    assert config.out_dir is not None
    folder = config.out_dir
    data = {key: dataset.manifest.get(key) for key in ("fingerprint", "tokenizer", "dtype")}
    data["request"] = dataset.manifest.get("request")
    data["tokens"] = dataset.tokens
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_free(folder)
        (folder / CHECKSUMS).unlink(missing_ok=True)
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        dataset.tokenizer.save(folder / TOKENIZER_FILE)
        write_json(folder / DATA, data)
        environment = Environment(**msgspec.structs.asdict(current_stage()) | dict(identity))
        write_json(folder / ENVIRONMENT, msgspec.to_builtins(environment))
        # Last: a folder with a config is one that can be resumed.
        write_json(folder / CONFIG, configs.to_dict(config))
        add_checksums(folder, START)
    except OSError as error:
        raise write_error(folder, error) from error
    return RunFolder(folder)


def require_free(folder: Path) -> None:
    """Raise a UserError if a new run in ``folder`` would mix with other files.

    Files of a run that was killed before it had a config do not count.
    """
    if not exists(folder):
        return
    with reading(folder):
        if not folder.is_dir():
            raise UserError(f"{folder} is a file: choose another --out_dir")
        found = {path.name for path in folder.iterdir()}
    started = {CHECKPOINTS, CHECKSUMS, *START}
    names = {name.removeprefix(".").removesuffix(".tmp") for name in found}
    if names - started or CONFIG in found:
        raise UserError(
            f"{folder} is not empty: choose another --out_dir, or continue the run in it with "
            f"`storylab resume {folder}`"
        )


def truncate_to(
    run: RunFolder, next_iteration: int, config: TrainConfig, findings: Mapping[str, Any]
) -> None:
    """Prepare a folder to continue at ``next_iteration``: drop everything after it, record the new stage.

    Args:
        run: the run.
        next_iteration: number of iterations that the checkpoint has done.
        config: the config to continue with.
        findings: results of the checks before the first step, fields of
            :class:`~storylab.record.schema.Stage`.

    Raises:
        UserError: the record is damaged, or cannot be written.
    """
    if not run.writes:
        return
    folder = run.folder
    kept = _lines_before(folder / METRICS, next_iteration)
    run.read_environment()
    # As plain JSON, so that keys of a later version stay.
    record = read_json(folder / ENVIRONMENT)
    lasting = [name for name in LASTING if exists(folder / name)]
    drop_checksums(folder, read_checksums(folder).sums.keys() - set(lasting))
    _write_rows(folder, kept)
    for stale in (SUMMARY, STORY_LOSSES, POSITION_LOSSES, TEST_LOSSES):
        (folder / stale).unlink(missing_ok=True)
    stage = msgspec.structs.asdict(current_stage())
    again = Resumption(**stage | dict(findings), iteration=next_iteration)
    resumed = [*record.get("resumed", []), msgspec.to_builtins(again)]
    write_json(folder / ENVIRONMENT, record | {"resumed": resumed})
    write_json(folder / CONFIG, configs.to_dict(config))
    known = read_checksums(folder).sums
    add_checksums(folder, (*(n for n in lasting if n not in known), ENVIRONMENT, CONFIG))


def drop_rows_from(run: RunFolder, iteration: int) -> None:
    """Drop the rows of ``iteration`` and later ones of a run under way.

    Raises:
        UserError: the rows are damaged, or cannot be written.
    """
    if run.writes:
        _write_rows(run.folder, _lines_before(run.folder / METRICS, iteration))


def _write_rows(folder: Path, lines: list[bytes]) -> None:
    with atomic_path(folder / METRICS) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in lines))


def _lines_before(path: Path, next_iteration: int) -> list[bytes]:
    kept, found = [], 0
    lines: list[bytes] = []
    if next_iteration and exists(path):
        with open_file(path) as file:
            lines = file.read().splitlines()
    # The lines that follow may be the remains of a power cut, and are not decoded.
    for row, line in rows_with_lines(lines, path):
        if row.iteration < next_iteration:
            kept.append(line)
            found += type(row).__struct_config__.tag == "iteration"
        if found == next_iteration:
            break
    if found != next_iteration:
        raise UserError(
            f"{path} has {found} of the {next_iteration} iterations that the "
            "checkpoint has done: restore it from a copy"
        )
    return kept


def end_run(run: RunFolder, summary: Summary) -> None:
    """Write ``summary.json`` and the checksum of every file; a folder with a summary has them all.

    Raises:
        UserError: a file cannot be read or written.
    """
    if not run.writes:
        return
    text = json.dumps(msgspec.to_builtins(summary), indent=2, allow_nan=False) + "\n"
    with atomic_path(run.folder / SUMMARY) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        sums = {name: sha256_file(run.folder / name) for name in files_of(run.folder)}
        write_checksums(run.folder, sums | {SUMMARY: sha256_file(temporary)})


def files_of(folder: Path) -> Iterator[str]:
    """Names of the files in a run folder and its ``checkpoints``, sorted, without hidden ones and the
    checksums themselves.

    Raises:
        UserError: a folder cannot be read.
    """
    with reading(folder):
        inside = [*folder.iterdir()]
        if (folder / CHECKPOINTS).is_dir():
            inside += (folder / CHECKPOINTS).iterdir()
        found = [path for path in inside if not path.name.startswith(".") and not path.is_dir()]
    names = (path.relative_to(folder).as_posix() for path in found)
    yield from sorted(name for name in names if name != CHECKSUMS)


def write_precision(run: RunFolder, found: Mapping[str, Any]) -> None:
    """Replace ``precision.json``.

    Raises:
        UserError: it cannot be written.
    """
    if run.writes:
        write_json(run.folder / PRECISION, found)
        add_checksums(run.folder, [PRECISION])


def append_to_log(run: RunFolder, line: str) -> None:
    """Add a line to ``log.txt``, also after the end of a run."""
    if not run.writes:
        return
    sealed = LOG in read_checksums(run.folder).sums
    drop_checksums(run.folder, [LOG])
    run.append(LOG, line)
    if sealed:
        add_checksums(run.folder, [LOG])


@dataclass(frozen=True)
class Prefix:
    """The beginning of a file that grows: its length in bytes, and its hex SHA-256."""

    bytes: int
    sha256: str


def prefixes(folder: Path) -> dict[str, Prefix]:
    """Rows and log as they are now, for the checkpoint that belongs to them."""
    found = {}
    for name in GROWING:
        if exists(folder / name):
            with open_file(folder / name) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                found[name] = Prefix(file.tell(), digest)
    return found


def require_prefix(folder: Path, name: str, known: Mapping[str, Prefix]) -> None:
    """Check that a file still begins as when the checkpoint with the prefixes ``known`` was saved.

    Raises:
        UserError: it has been altered, or cannot be read.
    """
    if name not in known:
        return  # a checkpoint of an earlier version
    with open_file(folder / name) as file:
        data = file.read(known[name].bytes)
    if hashlib.sha256(data).hexdigest() != known[name].sha256:
        raise altered(folder / name, "the newest checkpoint")
