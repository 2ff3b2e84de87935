"""A small tokenizer of llama2.c."""

from __future__ import annotations

import struct

_WORDS = [
    "b",
    "a",
    "o",
    "m",
    "T",
    " ",
    ".",
    "ab",
    "ba",
    "aa",
    "om",
    " T",
    "Tom",
    " Tom",
    "  ",
    "aaa",
    "aba",
]
# As `tokenizer.bin` spells them.
TOKENS = [
    *(b"<unk>", b"\n<s>\n", b"\n</s>\n"),
    *(f"<0x{byte:02X}>".encode() for byte in range(256)),
    *(word.encode() for word in _WORDS),
]
# Later words have lower scores, and two pairs have the same.
SCORES = [0.0] * 259 + [-float(i - (i == 8)) for i in range(len(_WORDS))]
VOCABULARY = len(TOKENS)


def tokenizer_bin() -> bytes:
    """The file: the longest length, then a score, a length and the bytes of every token."""
    entries = (
        struct.pack("<fI", score, len(token)) + token
        for token, score in zip(TOKENS, SCORES, strict=True)
    )
    return struct.pack("<I", max(map(len, TOKENS))) + b"".join(entries)
