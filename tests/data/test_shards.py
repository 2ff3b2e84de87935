"""Shards hold the stories, in ids of the right width."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from list_source import STORIES, write
from record_folders import forget_checksums
from storylab.data import builtin
from storylab.data.dataset import (
    fingerprint,
    load_dataset,
    narrow_ids,
    token_dtype,
)
from storylab.data.tokenizer import Tokenizer
from storylab.data.vocabulary import train_tokenizer
from storylab.errors import UserError


def wide_tokenizer() -> Tokenizer:
    """A tokenizer with more ids than 16 bits hold: every byte, and every pair of bytes."""
    single = [bytes([i]) for i in range(256)]
    return Tokenizer("wide", (*single, *(a + b for a in single for b in single)))


def test_a_vocabulary_over_16_bits_is_stored_whole(tmp_path: Path) -> None:
    tokenizer = wide_tokenizer()
    assert tokenizer.vocab_size == 65_793
    stories = [*STORIES, "ÿÿ \ufffd\uffff"]
    data = write(tmp_path / "wide", stories, tokenizer)
    assert data.manifest["dtype"] == "uint32"
    ids = data.splits["train"].read(0, len(data.splits["train"]))
    assert ids.max() == 65_792  # the end of text, which 16 bits would turn into 256
    text = tokenizer.decode([i for i in ids.tolist() if i != tokenizer.end_of_text])
    assert text == "".join(stories)


@pytest.mark.parametrize(("vocab_size", "name"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_dtype_follows_the_vocabulary(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size).name == name


def test_ids_are_checked_when_written() -> None:
    with pytest.raises(UserError, match="overflow"):
        narrow_ids(np.array([1]), 200_000, np.dtype(np.uint16))
    with pytest.raises(UserError, match="outside"):
        narrow_ids(np.array([5, 300]), 300, np.dtype(np.uint16))


def test_ids_are_checked_when_loaded(tmp_path: Path) -> None:
    """Data in 16 bits under a 17-bit vocabulary, consistent in every other way."""
    folder = tmp_path / "wide"
    data = write(folder, STORIES, wide_tokenizer())
    manifest = data.manifest | {"dtype": "uint16"}
    manifest["fingerprint"] = fingerprint(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    forget_checksums(folder)
    with pytest.raises(UserError, match="overflow"):
        load_dataset(folder)


def test_the_shards_hold_the_stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shards and chunks, so that both have borders; checked against one plain loop."""
    monkeypatch.setattr("storylab.data.shards.SHARD_TOKENS", 1000)
    monkeypatch.setattr("storylab.data.shards.CHUNK_BYTES", 3000)
    stories = list(builtin.stories(3, 0, 150))
    tokenizer = train_tokenizer(iter(stories), 300)
    split = write(tmp_path / "data", stories, tokenizer).splits["train"]
    expected = [i for s in stories for i in [*tokenizer.encode(s), tokenizer.end_of_text]]
    assert len(split.shards) > 10
    assert split.read(0, len(split)).tolist() == expected
    offsets = np.cumsum([[0, 0], *([len(tokenizer.encode(s)) + 1, len(s.encode())]
                                   for s in stories)], axis=0)  # fmt: skip
    assert split.stories.tolist() == offsets.tolist()
    window = split.windows([990, 1995], 20)
    assert window.tolist() == [expected[990:1010], expected[1995:2015]]
