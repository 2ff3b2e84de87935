"""Where stories come from: the Hugging Face hub, local files, the built-in corpus.

A source yields the raw texts of one split in a fixed order; :func:`clean` turns them into stories.
"""

from __future__ import annotations

import codecs
import json
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from storylab.data import builtin
from storylab.errors import UserError
from storylab.files import sha256_file

END_OF_TEXT = "<|endoftext|>"
TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
READ_BYTES = 1 << 20
MAX_STORY_BYTES = 64_000_000

THREE_WAYS = (
    "three ways on: local files (storylab prepare --train FILES --validation FILES "
    "--out data/tinystories-gpt2), a mirror of the hub (HF_ENDPOINT=URL before the command), or "
    "the built-in corpus (storylab prepare --source builtin, then --data_dir data/builtin-gpt2)"
)


class Source(Protocol):
    """Texts by split, and what identifies them."""

    def describe(self) -> dict[str, Any]:
        """JSON values that identify the content, for the manifest."""
        ...

    def texts(self, split: str) -> Iterator[str]:
        """Raw texts of ``split`` in order; one may hold several stories, see :func:`clean`."""
        ...

    def size_bytes(self, split: str) -> int | None:
        """About how many bytes of text the split has, for progress; None if unknown."""
        ...


def clean(texts: Iterator[str]) -> Iterator[str]:
    """Stories: texts cut at ``<|endoftext|>``, stripped of surrounding space, empty ones dropped."""
    for text in texts:
        for part in text.split(END_OF_TEXT):
            story = part.strip()
            if story:
                yield story


@dataclass(frozen=True)
class BuiltinSource:
    """Stories from the grammar in ``builtin.py``; one in twenty is for validation."""

    stories: int
    seed: int

    def describe(self) -> dict[str, Any]:
        grammar = sha256_file(Path(builtin.__file__))
        return {
            "name": "builtin",
            "stories": self.stories,
            "seed": self.seed,
            "grammar_sha256": grammar,
        }

    def texts(self, split: str) -> Iterator[str]:
        held_out = max(1, self.stories // 20)
        if split == VALIDATION:
            return builtin.stories(self.seed, 0, held_out)
        return builtin.stories(self.seed, held_out, self.stories - held_out)

    def size_bytes(self, split: str) -> int | None:
        return None


@dataclass(frozen=True)
class RowRange:
    """Rows ``first`` (included) to ``last`` (excluded; None: the end) of a split's files."""

    first: int = 0
    last: int | None = None


@dataclass(frozen=True)
class FileSource:
    """Stories in files; ``rows`` names the part of the files that belongs to a split."""

    name: str
    files: dict[str, tuple[Path, ...]]
    rows: dict[str, RowRange]
    origin: dict[str, str]

    def describe(self) -> dict[str, Any]:
        hashes = {
            split: [{"file": path.name, "sha256": sha256_file(path)} for path in paths]
            for split, paths in self.files.items()
        }
        return {"name": self.name, **self.origin, "files": hashes}

    def texts(self, split: str) -> Iterator[str]:
        part = self.rows.get(split, RowRange())
        for row, text in enumerate(t for path in self.files[split] for t in read_texts(path)):
            if part.last is not None and row >= part.last:
                return
            if row >= part.first:
                yield text

    def size_bytes(self, split: str) -> int | None:
        return sum(_text_bytes(path) for path in self.files[split])


@dataclass(frozen=True)
class HubDataset:
    """A data set on the hub: its repository, the pinned revision, and the files of each split."""

    repo: str
    revision: str
    files: dict[str, tuple[str, ...]]
    rows: dict[str, RowRange]


_TINYSTORIES_REVISION = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
_CLEAN_FILE = ("tinystories_gpt4_clean.parquet",)
HUB_DATASETS: dict[str, HubDataset] = {
    "tinystories": HubDataset(
        "roneneldan/TinyStories",
        _TINYSTORIES_REVISION,
        {
            TRAIN: (
                "data/train-00000-of-00004-2d5a1467fff1081b.parquet",
                "data/train-00001-of-00004-5852b56a2bd28fd9.parquet",
                "data/train-00002-of-00004-a26307300439e943.parquet",
                "data/train-00003-of-00004-d243063613e5a057.parquet",
            ),
            VALIDATION: ("data/validation-00000-of-00001-869c898b519ad725.parquet",),
        },
        {},
    ),
    "tinystories-v2": HubDataset(
        "roneneldan/TinyStories",
        _TINYSTORIES_REVISION,
        {
            TRAIN: ("TinyStoriesV2-GPT4-train.txt",),
            VALIDATION: ("TinyStoriesV2-GPT4-valid.txt",),
        },
        {},
    ),
    # The data set's card: shuffled rows, the first 10,000 for test, the next 10,000 for validation.
    "tinystories-gpt4-clean": HubDataset(
        "karpathy/tinystories-gpt4-clean",
        "main",
        {TRAIN: _CLEAN_FILE, VALIDATION: _CLEAN_FILE},
        {TRAIN: RowRange(20_000), VALIDATION: RowRange(10_000, 20_000)},
    ),
}


def hub_source(name: str) -> FileSource:
    """Download the named hub data set (resuming what is partly there) and read it from disk.

    Raises:
        UserError: the hub cannot be reached or does not have the files.
    """
    dataset = HUB_DATASETS[name]
    paths = {
        split: tuple(
            download(dataset.repo, file, dataset.revision, repo_type="dataset") for file in files
        )
        for split, files in dataset.files.items()
    }
    # The hub's cache puts a file under snapshots/COMMIT/, whatever name the revision was asked by.
    parts = paths[TRAIN][0].parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else dataset.revision
    return FileSource(name, paths, dataset.rows, {"repo": dataset.repo, "revision": commit})


def download(repo: str, file: str, revision: str, repo_type: str) -> Path:
    """Fetch one file of a hub repository into the hub's cache; an interrupted one is continued.

    Raises:
        UserError: no network, or no such file.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    # Its retries announce themselves at length; what comes of them is said below.
    hub_logging.set_verbosity_error()

    def fetch(cached: bool) -> Path:
        return Path(
            hf_hub_download(
                repo, file, revision=revision, repo_type=repo_type, local_files_only=cached
            )
        )

    try:
        return fetch(cached=True)
    except LocalEntryNotFoundError:
        pass
    endpoint = constants.ENDPOINT
    try:
        _check_reachable(endpoint)
        return fetch(cached=False)
    except Exception as error:  # the hub's client lets its transport's errors through
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"cannot get {file} of {repo} from {endpoint} ({reason}); {THREE_WAYS}"
        ) from error


def _check_reachable(endpoint: str) -> None:
    """Fail at once without a network, where the hub's client would try again for half a minute."""
    if urllib.request.getproxies():
        return  # a proxy reaches what this machine does not
    address = urllib.parse.urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    socket.create_connection((address.hostname or "", port), timeout=10).close()


def local_source(train: tuple[Path, ...], validation: tuple[Path, ...]) -> FileSource:
    """Local files; folders stand for the readable files in them, in order of their names.

    Raises:
        UserError: a path does not exist or holds no file of a known kind.
    """
    files = {TRAIN: _expand(train), VALIDATION: _expand(validation)}
    return FileSource("files", files, {}, {})


def _expand(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if _kind(p))
            if not inside:
                raise UserError(f"{path} has no .txt, .parquet or .jsonl file")
            found += inside
        elif not path.exists():
            raise UserError(f"{path} does not exist: give the path of a story file or folder")
        elif not _kind(path):
            raise UserError(
                f"{path} is of no known kind: use .txt with {END_OF_TEXT} between stories, "
                ".parquet with a text column, or .jsonl (also .gz or .zst)"
            )
        else:
            found.append(path)
    return tuple(found)


_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


def _kind(path: Path) -> str | None:
    """Which reader a file needs: txt, jsonl or parquet; None for other files."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in _COMPRESSION:
        suffixes = suffixes[:-1]
    kind = suffixes[-1].removeprefix(".") if suffixes else ""
    return kind if kind in ("txt", "jsonl", "parquet") else None


def _text_bytes(path: Path) -> int:
    """Size of the text in a file: exact for .txt, from the metadata for parquet, else a guess."""
    if _kind(path) == "parquet":
        with _reading(path):
            metadata = pq.ParquetFile(path).metadata
        return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return path.stat().st_size * (3 if path.suffix in _COMPRESSION else 1)


def read_texts(path: Path) -> Iterator[str]:
    """Texts of one file in order, a bounded part of it in memory at a time.

    Raises:
        UserError: the file is damaged, has no text column or is not UTF-8.
    """
    readers = {"txt": _read_txt, "jsonl": _read_jsonl, "parquet": _read_parquet}
    with _reading(path):
        yield from readers[_kind(path) or "txt"](path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what goes wrong with a file's content into a message that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read {path} ({reason}): get the file anew") from error


def _lines(path: Path, separator: str) -> Iterator[str]:
    """Pieces between separators, read in blocks; a byte order mark at the start is dropped."""
    mark, buffer, searched = separator.encode(), bytearray(), 0
    with pa.input_stream(str(path), compression=_COMPRESSION.get(path.suffix)) as stream:
        while block := stream.read(READ_BYTES):
            first = not buffer and not searched
            buffer += block.removeprefix(codecs.BOM_UTF8) if first else block
            begin = 0
            while (end := buffer.find(mark, max(begin, searched))) >= 0:
                yield buffer[begin:end].decode("utf-8")
                begin = searched = end + len(mark)
            del buffer[:begin]
            # A separator may span two blocks; what is searched once is not searched again.
            searched = max(0, len(buffer) - len(mark) + 1)
            if len(buffer) > MAX_STORY_BYTES:
                raise UserError(
                    f"{path} has over {MAX_STORY_BYTES // 10**6} MB without {separator!r}: put one "
                    "between stories"
                )
    yield buffer.decode("utf-8")


def _read_txt(path: Path) -> Iterator[str]:
    return _lines(path, END_OF_TEXT)


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path, "\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from error
        text = row.get("text", row.get("story")) if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise UserError(f'{path} line {number} has no "text" (or "story") string')
        text.encode()  # half of a surrogate pair is valid JSON and no text: a UnicodeError
        yield text


def _read_parquet(path: Path) -> Iterator[str]:
    file = pq.ParquetFile(path)
    names = [name for name in ("text", "story") if name in file.schema_arrow.names]
    if not names:
        columns = ", ".join(file.schema_arrow.names)
        raise UserError(f"{path} has no column 'text' or 'story' (its columns: {columns})")
    kind = file.schema_arrow.field(names[0]).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: the column '{names[0]}' holds {kind}, not text")
    for batch in file.iter_batches(batch_size=4096, columns=names[:1]):
        # Rows are counted by their place in the file, so an empty one is kept until cleaning.
        yield from (text or "" for text in batch.column(0).to_pylist())
