"""Our tokenizers as other programs read byte-pair vocabularies: characters for bytes, and merges."""

from __future__ import annotations

import json
from collections.abc import Iterator

from storylab.data.layout import END_OF_TEXT
from storylab.data.tokenizer import Tokenizer
from storylab.data.vocabulary import byte_characters
from storylab.errors import UserError


def byte_level_tokens(tokenizer: Tokenizer) -> list[str]:
    """The tokens in order of id, GPT-2's printable character for each byte, without the end of text."""
    table = byte_characters()
    return ["".join(table[byte] for byte in token) for token in tokenizer.tokens]


def merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The pairs that make the longer tokens, in the order in which they are merged.

    A tokenizer of ranks has no list of pairs. The pair of a token is what merging its bytes by the ranks
    below its own leaves.

    Raises:
        UserError: a token is not a pair of earlier tokens.
    """
    table = byte_characters()
    return [
        ("".join(table[byte] for byte in first), "".join(table[byte] for byte in second))
        for first, second in _pairs(tokenizer.tokens)
    ]


def _pairs(tokens: tuple[bytes, ...]) -> Iterator[tuple[bytes, bytes]]:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for rank, token in enumerate(tokens):
        if len(token) > 1:
            parts = _merged(token, ranks, rank)
            if len(parts) != 2:
                raise UserError(
                    f"token {rank} of the run's tokenizer ({token!r}) is not a pair of earlier tokens: "
                    "it was not made by byte-pair encoding, and other programs cannot read it"
                )
            yield parts[0], parts[1]


def _merged(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """``token`` after all merges of a rank under ``below``, lowest rank first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        found = [ranks.get(parts[i] + parts[i + 1], below) for i in range(len(parts) - 1)]
        best = min(found)
        if best >= below:
            break
        place = found.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """``tokenizer.json``: the same ids as our tokenizer's, with the end of text before every story.

    The library's ``ByteLevel`` splits text by GPT-2's rule, as our tokenizers do.

    Raises:
        UserError: the tokenizer was not made by byte-pair encoding.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as LibraryTokenizer

    vocabulary = {token: i for i, token in enumerate(byte_level_tokens(tokenizer))}
    library = LibraryTokenizer(models.BPE(vocabulary, merges(tokenizer)))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    assert library.token_to_id(END_OF_TEXT) == tokenizer.end_of_text
    library.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B:1",
        special_tokens=[(END_OF_TEXT, tokenizer.end_of_text)],
    )
    return json.dumps(json.loads(library.to_str()), ensure_ascii=False, indent=1) + "\n"
