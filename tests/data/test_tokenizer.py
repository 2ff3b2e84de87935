"""Tokenizers against the `tokenizers` library: every id right, on any text."""

from __future__ import annotations

import base64
import itertools
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_reference import hugging_face_gpt2
from list_source import stories_in
from story_files import END, data_from, stories_of
from storylab.data import builtin
from storylab.data import tokenizer as tokenizers_here
from storylab.data import vocabulary as vocabularies
from storylab.data.prepare import PrepareConfig, prepare
from storylab.data.tokenizer import Tokenizer, gpt2_tokenizer, load_tokenizer
from storylab.data.vocabulary import train_tokenizer
from storylab.errors import UserError


def test_gpt2_tokenizer_is_the_published_one() -> None:
    tokenizer = gpt2_tokenizer()
    assert tokenizer.vocab_size == 50257 and tokenizer.end_of_text == 50256
    # The SHA-256 that tiktoken publishes for r50k_base.tiktoken, the same vocabulary.
    expected = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert tokenizer.sha256 == expected
    assert tokenizer.encode("Hello world") == [15496, 995]


def test_gpt2_ids_equal_those_of_another_library(real_stories: Path) -> None:
    path = real_stories / "v1-validation-00000-of-00001.parquet"
    stories = stories_in(path)
    tokenizer, other = gpt2_tokenizer(), hugging_face_gpt2()
    ids = tokenizer.encode_stories(stories)
    expected = [i for s in stories for i in [*other.encode(s).ids, 50256]]
    assert ids.tolist() == expected


@settings(max_examples=400, deadline=None)
@given(st.lists(st.text(st.sampled_from(" \n\t\u00a0\x1c\u3000ab1é.'s"), max_size=12), max_size=5))
def test_ids_of_stories_equal_those_of_each_alone(stories: list[str]) -> None:
    """Through the fast rule where it applies: white space of every kind and length among words."""
    tokenizer = small_tokenizer()
    expected = [i for s in stories for i in [*tokenizer.encode(s), tokenizer.end_of_text]]
    ids = tokenizer.encode_stories(stories).tolist() if stories else []
    assert ids == expected


@cache
def small_tokenizer() -> Tokenizer:
    """Every byte, and the pairs that would be merged if white space were cut differently."""
    single = [bytes([i]) for i in range(256)]
    spaces = [b"  ", b" \n", b"\n\n", b"\n ", b"\t\t", b" a", b" b", b" 1", b" .", b"ab", b"'s"]
    return Tokenizer("small", (*single, *spaces, b"   ", b"\n\n\n"))


def test_trained_vocabulary_encodes_as_its_trainer_would(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Other
    from tokenizers import models, pre_tokenizers, trainers

    stories = list(builtin.stories(0, 0, 300))
    tokenizer = train_tokenizer(iter(stories), 400)
    assert tokenizer.vocab_size == 400
    other = Other(models.BPE())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = trainers.BpeTrainer(vocab_size=399, initial_alphabet=alphabet, show_progress=False)
    other.train_from_iterator(stories, options)
    for text in [*stories[:20], "Ünseen “text”, 12 34\n\n  spaces "]:
        assert tokenizer.encode(text) == other.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save(tmp_path / "t.tiktoken")
    assert load_tokenizer(tmp_path / "t.tiktoken", "bpe:400") == tokenizer


def test_a_tokenizer_sees_the_training_split_only(tmp_path: Path) -> None:
    """Nor the validation stories that are in the training files as well."""
    train = list(builtin.stories(0, 0, 200))
    held_out = ["zyxwvut qqq zyxwvut"] * 500
    files = {"train": train + held_out, "validation": held_out}
    for split, stories in files.items():
        (tmp_path / f"{split}.txt").write_text("<|endoftext|>".join(stories))
    config = PrepareConfig(
        train=(tmp_path / "train.txt",),
        validation=(tmp_path / "validation.txt",),
        tokenizer="bpe:350",
        out=tmp_path / "out",
    )
    assert prepare(config).tokenizer.tokens == train_tokenizer(iter(train), 350).tokens


def test_altered_gpt2_file_is_refused(tmp_path: Path) -> None:
    # No public function gives the files that are altered here.
    from storylab.data.tokenizer import _gpt2_file

    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(_gpt2_file(name, None), tmp_path / name)
    assert gpt2_tokenizer(tmp_path).vocab_size == 50257
    with open(tmp_path / "vocab.bpe", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="SHA-256"):
        gpt2_tokenizer(tmp_path)


def test_base64_of_the_tokenizer_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "t.tiktoken"
    path.write_bytes(base64.b64encode(b"a") + b" 0\n" + base64.b64encode(b"b") + b" 7\n")
    with pytest.raises(UserError, match="out of order"):
        load_tokenizer(path, "x")
    path.write_bytes(b"not base64! 0\n")
    with pytest.raises(UserError, match="not a"):
        load_tokenizer(path, "x")


GPT2, OTHER_GPT2 = gpt2_tokenizer(), hugging_face_gpt2()


def with_short_runs_cut(text: str) -> list[int]:
    """Ids of GPT-2 with runs of white space cut that are long for this test."""
    pattern = re.compile(tokenizers_here.HUGE_SPACE.pattern.replace("10000", "3"))
    with pytest.MonkeyPatch.context() as patch:
        # Runs of 10,000 are too long for a reference to encode hundreds of times.
        patch.setattr(tokenizers_here, "HUGE_SPACE", pattern)
        patch.setattr(tokenizers_here, "MAX_SPACE", 3)
        ids = GPT2.encode_stories([text]).tolist()
        assert GPT2.encode(text) == ids[:-1]
        return ids


SPACES = " \n\t\r\u00a0\u0085\u1680\u2003\u2028\u202f\u3000\x0b\x1c\u200b"


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.text(st.sampled_from(SPACES + "   \n\nab1é.'s"), max_size=30))
def test_runs_of_space_are_cut_as_gpt2_would(text: str) -> None:
    assert with_short_runs_cut(text) == [*gpt2_ids(text), 50256]


def gpt2_ids(text: str) -> list[int]:
    return list(OTHER_GPT2.encode(text).ids)


@pytest.mark.parametrize("space", [" ", "\n", "\u3000"])
@pytest.mark.parametrize("end", ["y", "\u00e9", ".", "1", "'s"])
def test_long_runs_of_space_are_encoded_as_gpt2_would(space: str, end: str) -> None:
    for length in (9_999, 10_000, 10_001, 40_000):
        text = f"x{space * length}{end}\n \nz{space * length}"
        assert GPT2.encode(text) == gpt2_ids(text)


def test_a_million_spaces_are_prepared(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" + " " * 1_000_000 + "y")
    split = data_from(tmp_path, tmp_path / "a.txt").splits["train"]
    x, space, y = (gpt2_ids(text)[0] for text in ("x", " ", " y"))
    ids = split.read(0, len(split)).tolist()
    assert gpt2_ids("x" + " " * 1000 + "y") == [x, *[space] * 999, y]
    assert ids == [x, *[space] * 999_999, y, 50256]


@pytest.mark.parametrize("word", ["a", "\u6f22\u5b57\u4e00\u4e8c", "-", "12"])
def test_long_words_are_encoded_as_gpt2_would(word: str) -> None:
    text = word * (20_000 // len(word)) + " end"
    assert GPT2.encode_stories([text]).tolist() == [*gpt2_ids(text), 50256]


def test_long_words_are_counted_in_pieces(tmp_path: Path) -> None:
    """A vocabulary of text with long words is that of the same text with the words cut."""
    chance = random.Random(1)
    long = ["".join(chance.choices("abcd", k=n)) for n in (257, 5000, 512, 300)]
    usual = ["".join(chance.choices("abcd", k=n)) for n in (256, 255, 100)]
    cut = [word[i : i + 256] for word in long for i in range(0, len(word), 256)]
    whole = train_tokenizer(iter([*long, *usual]), 400)
    assert whole.tokens == plainly_trained([*cut, *usual], 400)
    assert whole.tokens != plainly_trained([*long, *usual], 400)


def plainly_trained(texts: list[str], size: int) -> tuple[bytes, ...]:
    """The vocabulary of the `tokenizers` library alone, of texts in letters that are their own tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trainer = Tokenizer(models.BPE())
    trainer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = trainers.BpeTrainer(
        vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False
    )
    trainer.train_from_iterator(texts, options)
    vocabulary = trainer.get_vocab()
    learned = sorted(vocabulary, key=vocabulary.__getitem__)[256:]
    return (*train_tokenizer(iter(["abab"]), 258).tokens[:256], *(t.encode() for t in learned))


@pytest.mark.slow
def test_a_long_word_among_stories_is_learned_from(tmp_path: Path) -> None:
    """Work that grew with the square of a word would keep this for hours."""
    stories = list(builtin.stories(0, 0, 60))
    words = ["a" * 1_000_000, "\u6f22\u5b57\u4e00\u4e8c" * 100_000, "x" + " " * 1_000_000 + "y"]
    (tmp_path / "a.txt").write_text(END.join([*stories, *words]), encoding="utf-8")
    data = data_from(tmp_path, tmp_path / "a.txt", tokenizer="bpe:300")
    assert stories_of(data) == [*stories, *words]


@pytest.mark.slow
@pytest.mark.posix
def test_training_a_vocabulary_hears_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    # The trainer reads without end, so that the signal always finds it at work.
    monkeypatch.setattr(vocabularies, "TRAINING_BYTES", 10**15)
    # A shell that starts the tests in the background has them ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started, given_up = threading.Event(), time.monotonic() + 600

    def endless() -> Iterator[str]:
        for number in itertools.count():
            started.set()
            if time.monotonic() > given_up:
                raise AssertionError("Ctrl-C was not heard")
            yield builtin.story(0, number)

    def press() -> None:
        started.wait()
        os.kill(os.getpid(), 2)

    threading.Thread(target=press).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(endless(), 300)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b" 0\n", b"\t0\n"),
        (b" 9\n", b" 09\n"),
        (b"AA== ", b"AB== "),  # bits that no byte has
        (b" 7\n", b" 7\r\n"),
    ],
)
def test_bytes_that_mean_the_same_tokens_are_found_too(
    old: bytes, new: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "t.tiktoken"
    tokenizer = Tokenizer("x", tuple(bytes([i]) for i in range(256)))
    tokenizer.save(path)
    assert load_tokenizer(path, "x") == tokenizer
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    with pytest.raises(UserError, match="not as storylab writes it"):
        load_tokenizer(path, "x")
