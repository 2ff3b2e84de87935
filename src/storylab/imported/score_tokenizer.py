"""The tokenizer of llama2.c (``tokenizer.bin``): SentencePiece's byte-pair encoding by scores.

The file is the length of the longest token (uint32), then for every id a score (float32), a length
(uint32) and that many bytes, all little-endian. Ids 0, 1 and 2 are unknown, begin and end, ids 3 to
258 the bytes, which replace characters that are no token (``tokenizer.py`` and ``run.c`` of
github.com/karpathy/llama2.c; Kudo and Richardson 2018, arXiv 1808.06226).
"""

from __future__ import annotations

import heapq
import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from storylab.errors import UserError
from storylab.files import shown

BEGIN, END = 1, 2
FIRST_BYTE = 3
FIRST_TOKEN = FIRST_BYTE + 256
_ENTRY = struct.Struct("<fI")
# The right half of a pair that has been merged.
GONE = -1
# Distinct words whose tokens are remembered.
WORDS = 2**16


@dataclass(frozen=True)
class ScoreTokenizer:
    """Ids for text and text for ids.

    Attributes:
        tokens: the bytes of every id; those of bytes are single bytes.
        scores: by id; of two pairs of neighbors, the one whose joined token has the higher score is merged
            first.
        begin_of_text: id before a story.
        end_of_text: id after a story.
    """

    tokens: tuple[bytes, ...]
    scores: tuple[float, ...]
    begin_of_text: int
    end_of_text: int

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        ids: dict[bytes, int] = {}
        for number in range(FIRST_TOKEN, len(self.tokens)):
            ids.setdefault(self.tokens[number], number)
        return ids

    @cached_property
    def _words(self) -> re.Pattern[str] | None:
        """Matches the parts of a text that no token joins; None if a token may join any."""
        joins = any(re.search(rb"[^ ] ", token) for token in self._ids)
        return None if joins else re.compile(" *[^ ]+| +")

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` with a space before it, as SentencePiece has it; half a surrogate pair is
        U+FFFD."""
        if not text:
            return []
        whole = " " + text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        words = [whole] if self._words is None else self._words.findall(whole)
        return [token for word in words for token in self._word(word)]

    def encode_stories(self, stories: Sequence[str]) -> list[list[int]]:
        """Ids of each story."""
        return [self.encode(story) for story in stories]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of ``ids``."""
        return b"".join(self.tokens[token] for token in ids)

    @cached_property
    def _word(self) -> Callable[[str], list[int]]:
        """Ids of a word; those of frequent words are remembered."""
        return lru_cache(WORDS)(self._encode_word)

    def _encode_word(self, word: str) -> list[int]:
        ids: list[int] = []
        for character in word:
            data = character.encode()
            known = self._ids.get(data)
            ids += [FIRST_BYTE + byte for byte in data] if known is None else [known]
        return self._merged(ids)

    def _merged(self, ids: list[int]) -> list[int]:
        """``ids`` after all merges: highest score first, of equal ones the leftmost. Bytes never merge."""
        count = len(ids)
        before, after = list(range(-1, count - 1)), list(range(1, count + 1))
        waiting: list[tuple[float, int, int, int, int]] = []

        def offer(place: int) -> None:
            """Put the pair that begins at ``place`` on the heap, if it joins to a token."""
            if place < 0 or after[place] >= count:
                return
            left, right = ids[place], ids[after[place]]
            token = self._ids.get(self.tokens[left] + self.tokens[right])
            if token is not None and min(left, right) >= FIRST_TOKEN:
                heapq.heappush(waiting, (-self.scores[token], place, left, right, token))

        for place in range(count):
            offer(place)
        while waiting:
            _, place, left, right, token = heapq.heappop(waiting)
            other = after[place]
            # Entries of pairs that an earlier merge has changed are still on the heap.
            if ids[place] != left or other >= count or ids[other] != right:
                continue
            ids[place], ids[other] = token, GONE
            after[place] = after[other]
            if after[place] < count:
                before[after[place]] = place
            offer(before[place])
            offer(place)
        return [token for token in ids if token != GONE]


def read_score_tokenizer(
    data: bytes, place: Path, vocab_size: int, begin: int, end: int
) -> ScoreTokenizer:
    """Decode the content of ``tokenizer.bin``.

    Args:
        data: content of the file.
        place: its path, for messages.
        vocab_size: number of ids of the model.
        begin: id before a story.
        end: id after a story.

    Raises:
        UserError: it is not of that format.
    """
    tokens: list[bytes] = []
    scores: list[float] = []
    at = 4
    while at < len(data):
        if at + _ENTRY.size > len(data):
            raise UserError(f"{shown(place)} ends within token {len(tokens)}: get it again")
        score, length = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size
        if length > len(data) - at:
            raise UserError(
                f"{shown(place)}: token {len(tokens)} has {length} bytes, and the file has "
                f"{len(data) - at} more: it is no tokenizer.bin of llama2.c, or not whole"
            )
        if not math.isfinite(score):
            raise UserError(f"{shown(place)}: the score of token {len(tokens)} is {score}")
        tokens.append(data[at : at + length])
        scores.append(score)
        at += length
    if len(tokens) != vocab_size:
        raise UserError(
            f"{shown(place)} has {len(tokens)} tokens, the model's vocabulary {vocab_size}: they do not "
            "belong together"
        )
    named = [f"<0x{byte:02X}>".encode() for byte in range(256)]
    if tokens[FIRST_BYTE:FIRST_TOKEN] != named:
        raise UserError(
            f"{shown(place)}: ids {FIRST_BYTE} to {FIRST_TOKEN - 1} are not the 256 bytes: it is no "
            "tokenizer.bin of llama2.c"
        )
    tokens[:FIRST_TOKEN] = [b"", b"", b"", *(bytes([byte]) for byte in range(256))]
    return ScoreTokenizer(tuple(tokens), tuple(scores), begin, end)
