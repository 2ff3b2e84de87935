"""Tokenizers of imported models: bytes for ids, ids around a text, and llama2.c's merges by score."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers, processors

from score_tokenizers import SCORES, TOKENS, VOCABULARY, tokenizer_bin
from storylab.errors import UserError
from storylab.imported.json_tokenizer import added_ids, read_json_tokenizer
from storylab.imported.score_tokenizer import ScoreTokenizer, read_score_tokenizer

PLACE = Path("tokenizer")
TEXTS = st.text(st.sampled_from("abc Tom.\n<0xA>é🎈"), max_size=40)


def score_tokenizer() -> ScoreTokenizer:
    return read_score_tokenizer(tokenizer_bin(), PLACE, VOCABULARY, 1, 1)


def by_run_c(text: str) -> list[int]:
    """The loop of run.c, over all pairs at every merge."""
    if not text:
        return []
    ids: list[int] = []
    for character in " " + text:
        data = character.encode()
        found = TOKENS.index(data) if data in TOKENS[259:] else None
        ids += [3 + byte for byte in data] if found is None else [found]
    while True:
        best, where, merged = -1e10, -1, -1
        for i in range(len(ids) - 1):
            joined = TOKENS[ids[i]] + TOKENS[ids[i + 1]]
            if joined in TOKENS and SCORES[TOKENS.index(joined)] > best:
                merged = TOKENS.index(joined)
                best, where = SCORES[merged], i
        if where < 0:
            return ids
        ids[where : where + 2] = [merged]


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_merges_are_those_of_run_c(text: str) -> None:
    tokenizer = score_tokenizer()
    ids = tokenizer.encode(text)
    assert ids == by_run_c(text)
    assert tokenizer.decode_bytes(ids) == (b" " + text.encode() if text else b"")


def test_a_token_with_a_space_inside_joins_words() -> None:
    """Then a text is merged as a whole."""
    tokens = [*TOKENS, b"m ", b"m T"]
    scores = [*SCORES, 5.0, 6.0]
    data = struct.pack("<I", 9) + b"".join(
        struct.pack("<fI", score, len(token)) + token
        for token, score in zip(tokens, scores, strict=True)
    )
    tokenizer = read_score_tokenizer(data, PLACE, len(tokens), 1, 1)
    assert len(tokens) - 1 in tokenizer.encode("Tom Tom")


def test_a_long_word_takes_no_square_of_its_length() -> None:
    text = "ab" * 100_000
    tokenizer = score_tokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == b" " + text.encode()


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "has 0 tokens"),
        (
            tokenizer_bin()[:-1],
            "token 2.. has 2 bytes, and the file has 1 more|bytes, and the file",
        ),
        (tokenizer_bin() + b"\0", "ends within token"),
        (tokenizer_bin() + struct.pack("<fI", 0, 2**31), "has 2147483648 bytes"),
        (tokenizer_bin() + struct.pack("<fI", 0, 0), f"has {VOCABULARY + 1} tokens"),
        (tokenizer_bin().replace(b"<0x41>", b"<0x42>"), "are not the 256 bytes"),
        (tokenizer_bin()[:4] + struct.pack("<f", float("nan")) + tokenizer_bin()[8:], "score of"),
    ],
)
def test_a_damaged_tokenizer_bin_is_one_line(data: bytes, line: str) -> None:
    with pytest.raises(UserError, match=line):
        read_score_tokenizer(data, PLACE, VOCABULARY, 1, 1)


def sentencepiece_json() -> LibraryTokenizer:
    """A tokenizer of the form that Llama 2 and Mistral have."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581", "T", "o", "m", "om", "Tom", "\u2581Tom"]
    library = LibraryTokenizer(
        models.BPE(
            {word: number for number, word in enumerate(words)},
            [("o", "m"), ("T", "om"), ("\u2581", "Tom")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return library


def test_sentencepieces_bytes_come_back() -> None:
    library = sentencepiece_json()
    tokenizer = read_json_tokenizer(library.to_str().encode(), PLACE, 300, 1, 2)
    assert added_ids(tokenizer, PLACE) == ([1], [])
    for text in ("Tom Tom", "Tom\n\N{BALLOON}", "</s> Tom", "  T"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == b" " + text.encode()
        assert not {1, 2} & set(ids)  # special tokens in a story are text
    assert tokenizer.encode("Tom \N{BALLOON}") == library.encode("Tom \N{BALLOON}").ids[1:]


def changed(values: dict[str, Any]) -> bytes:
    return json.dumps(json.loads(sentencepiece_json().to_str()) | values).encode()


def template(name: str) -> dict[str, Any]:
    """A post-processor that puts ``name`` before a text and explains ``<s>`` alone."""
    text, token = (
        {"Sequence": {"id": "A", "type_id": 0}},
        {"id": "<s>", "ids": [1], "tokens": ["<s>"]},
    )
    single = [{"SpecialToken": {"id": name, "type_id": 0}}, text]
    kind = {"type": "TemplateProcessing", "special_tokens": {"<s>": token}}
    return {**kind, "single": single, "pair": [*single, text]}


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "model.type is None"),
        (changed({"model": {"type": "Unigram", "vocab": []}}), "model.type is 'Unigram'"),
        (changed({"model": {"type": "BPE"}}), "is no tokenizer"),
        (changed({"decoder": None}), "decoder is none"),
        (changed({"decoder": {"type": "WordPiece", "prefix": "##"}}), "decoder is WordPiece|is no"),
        (
            changed({"model": {"type": "BPE", "vocab": {"a": 10**9}, "merges": []}}),
            "has id 1000000",
        ),
        (changed({"post_processor": template("</x>")}), "names the token '</x>'"),
        (
            changed({"post_processor": {"type": "Sequence", "processors": [template("</x>")]}}),
            "names the token '</x>'",
        ),
        (changed({"model": {"type": "BPE", "continuing_subword_prefix": "##"}}), "prefix is '##'"),
    ],
)
def test_another_kind_of_tokenizer_is_one_line(data: bytes, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        read_json_tokenizer(data, PLACE, 300, 1, 2)
    assert "\n" not in str(caught.value)


class PanicException(BaseException):
    """As the library's, which nothing exports."""


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (PanicException("range end index 4"), UserError),
        (ValueError("x"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_panic_of_the_library_is_one_line(
    raised: BaseException, expected: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(data: str) -> LibraryTokenizer:
        raise raised

    monkeypatch.setattr(
        "storylab.imported.json_tokenizer.LibraryTokenizer.from_str", panic, raising=False
    )
    with pytest.raises(expected):
        read_json_tokenizer(changed({}), PLACE, 300, 1, 2)


def test_words_are_cut_where_no_token_joins() -> None:
    """With and without the cuts, the ids are the same."""
    cut, whole = score_tokenizer(), score_tokenizer()
    whole.__dict__["_words"] = None
    draws = random.Random(1)
    for _ in range(100):
        text = "".join(draws.choices("ab Tom", k=30))
        assert cut.encode(text) == whole.encode(text)
