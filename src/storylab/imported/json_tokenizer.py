"""Tokenizers in the ``tokenizer.json`` of Hugging Face's `tokenizers`: byte-pair encodings of bytes.

https://huggingface.co/docs/tokenizers
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer

from storylab.data.vocabulary import byte_characters
from storylab.decode import shown as shortened
from storylab.errors import UserError
from storylab.files import json_of, shown

SPACE = "\u2581"


@dataclass(frozen=True)
class JsonTokenizer:
    """Ids for text and text for ids.

    Attributes:
        library: the tokenizer in the library's form.
        tokens: the bytes of every id; none for ids without a token.
        begin_of_text: id before a story.
        end_of_text: id after a story.
    """

    library: LibraryTokenizer
    tokens: tuple[bytes, ...]
    begin_of_text: int
    end_of_text: int

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without those that the tokenizer puts around it; special tokens in it are
        ordinary text, and half a surrogate pair is U+FFFD."""
        return self.encode_stories([text])[0]

    def encode_stories(self, stories: Sequence[str]) -> list[list[int]]:
        """Ids of each story."""
        whole = [s.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for s in stories]
        found = self.library.encode_batch(whole, add_special_tokens=False)
        return [list(encoding.ids) for encoding in found]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of ``ids``; nothing for ids without a token."""
        return b"".join(self.tokens[token] for token in ids)


def read_json_tokenizer(
    data: bytes, place: Path, vocab_size: int, begin: int, end: int
) -> JsonTokenizer:
    """Decode the content of ``tokenizer.json``.

    Args:
        data: content of the file.
        place: its path, for messages.
        vocab_size: number of ids of the model; the tokenizer may have fewer.
        begin: id before a story.
        end: id after a story.

    Raises:
        UserError: it is no byte-pair encoding, or has more ids than the model.
    """
    values = json_of(data, place)
    kind = _part(values, "model").get("type")
    if kind != "BPE":
        raise UserError(f"{shown(place)}: model.type is {kind!r}: storylab reads BPE alone")
    _refuse_panics(values, place)
    with _refusing(place):
        library = LibraryTokenizer.from_str(data.decode())
    highest = max(library.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= vocab_size:
        raise UserError(
            f"{shown(place)} has id {highest}, the model's vocabulary is {vocab_size}: they do not belong "
            "together"
        )
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    return JsonTokenizer(library, _token_bytes(library, values, vocab_size, place), begin, end)


def added_ids(tokenizer: JsonTokenizer, place: Path) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text.

    Raises:
        UserError: it changes the text between them.
    """
    library = tokenizer.library
    with _refusing(place):
        bare = library.encode("Tom", add_special_tokens=False).ids
        full = library.encode("Tom").ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise UserError(f"{shown(place)}: post_processor changes the tokens of a text")


@contextmanager
def _refusing(place: Path) -> Iterator[None]:
    """Turn what the library raises into a UserError: it has no more special class, and one that is no
    Exception for its panics."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = shown(str(error).partition("\n")[0])
        raise UserError(f"{shown(place)} is no tokenizer ({reason})") from error


def _refuse_panics(values: Any, place: Path) -> None:
    """Refuse content on which the library panics, which prints lines that nobody can read.

    Raises:
        UserError: post_processor names a token that it does not explain, or tokens have a prefix.
    """
    if prefix := _part(values, "model").get("continuing_subword_prefix"):
        raise UserError(
            f"{shown(place)}: model.continuing_subword_prefix is {shortened(prefix)}: storylab reads "
            "tokenizers without one"
        )
    for part in _nested(_part(values, "post_processor"), "processors"):
        known = _part(part, "special_tokens")
        for item in (*_items(part.get("single")), *_items(part.get("pair"))):
            name = _part(item, "SpecialToken").get("id")
            if name is not None and name not in [*known]:  # it may have no hash
                raise UserError(
                    f"{shown(place)}: post_processor names the token {shortened(name)}, which is not "
                    "among its special_tokens"
                )


def _nested(part: Any, key: str) -> Iterator[dict[str, Any]]:
    """A part of a tokenizer, and those that it has as its ``key``."""
    if isinstance(part, dict):
        yield part
        for inner in _items(part.get(key)):
            yield from _nested(inner, key)


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _part(values: Any, name: str) -> dict[str, Any]:
    part = values.get(name) if isinstance(values, dict) else None
    return part if isinstance(part, dict) else {}


def _token_bytes(
    library: LibraryTokenizer, values: dict[str, Any], vocab_size: int, place: Path
) -> tuple[bytes, ...]:
    """The bytes of every id, by the decoder that the file names.

    Raises:
        UserError: the decoder is another than those of Llama, Mistral and Qwen.
    """
    vocabulary = library.get_vocab(with_added_tokens=True)
    kinds = {str(part.get("type")) for part in _nested(values.get("decoder"), "decoders")}
    if "ByteLevel" in kinds:
        spelled = {character: byte for byte, character in byte_characters().items()}
    elif kinds & {"ByteFallback", "Metaspace"}:
        spelled = {}
    else:
        names = ", ".join(sorted(kinds)) or "none"
        raise UserError(
            f"{shown(place)}: decoder is {shown(names)}: storylab reads ByteLevel, ByteFallback, Metaspace"
        )
    added = {token.content for token in library.get_added_tokens_decoder().values()}
    tokens = [b""] * vocab_size
    for token, number in vocabulary.items():
        if token in added:
            tokens[number] = token.encode()
        elif spelled:
            tokens[number] = bytes(spelled[c] for c in token if c in spelled)
        elif byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            tokens[number] = bytes([int(byte[1], 16)])
        else:
            tokens[number] = token.replace(SPACE, " ").encode()
    return tuple(tokens)
