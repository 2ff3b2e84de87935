"""From stories to batches: every id right, every fault seen, every window once."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storylab.data import builtin
from storylab.data.batches import Prefetcher, TrainingBatches, evaluation_windows, permutation
from storylab.data.dataset import (
    Dataset,
    Split,
    fingerprint,
    load_dataset,
    narrow_ids,
    token_dtype,
)
from storylab.data.prepare import PrepareConfig, prepare, write_dataset
from storylab.data.reading import clean, read_texts
from storylab.data.sources import FileSource, RowRange
from storylab.data.tally import Tally
from storylab.data.tokenizer import Tokenizer, gpt2_tokenizer, load_tokenizer, train_tokenizer
from storylab.errors import UserError
from storylab.files import exclusive

STORIES = ["Tom ran.", "Él comió “pan”.\n\nThe end.", "A cat sat on 1,234 mats!", "Tom ran."]


@dataclass(frozen=True)
class ListSource:
    """Stories from a list, for tests."""

    splits: dict[str, list[str]]

    @property
    def has_test(self) -> bool:
        return "test" in self.splits

    def describe(self) -> dict[str, Any]:
        return {"name": "list"}

    def texts(self, split: str, tally: Tally) -> Iterator[str]:
        return iter(self.splits[split])

    def size_bytes(self, split: str) -> int | None:
        return None


def stories_in(path: Path) -> list[str]:
    return list(clean(read_texts(path, Tally()), Tally()))


def write(folder: Path, train: list[str], tokenizer: Tokenizer, keep: bool = False) -> Dataset:
    source = ListSource({"train": train, "validation": ["Only here. " * 9]})
    write_dataset(folder, source, tokenizer, {}, keep, lambda *progress: None)
    return load_dataset(folder)


# --- sources


def test_every_file_format_gives_the_same_stories(tmp_path: Path) -> None:
    text = "\n<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n"
    rows = "".join(json.dumps({"text": s}) + "\n" for s in STORIES)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    with pa.output_stream(str(tmp_path / "d.txt.zst"), compression="zstd") as stream:
        stream.write(text.encode())
    pq.write_table(pa.table({"text": STORIES}), tmp_path / "e.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert stories_in(path) == STORIES, path


def test_stories_longer_than_a_read_block_stay_whole(tmp_path: Path) -> None:
    stories = ["é" * 1_500_001, "short", "x" * 3_000_000]
    path = tmp_path / "long.txt"
    path.write_text("<|endoftext|>".join(stories), encoding="utf-8")
    assert stories_in(path) == stories


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("One.<|endoftext|>Two.".encode("utf-8-sig"))
    assert stories_in(tmp_path / "a.txt") == ["One.", "Two."]


def test_separators_across_blocks_and_text_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stories = ["é" * n for n in range(1, 40)] + ["<|endof|>" * 3]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(stories), encoding="utf-8")
    for size in (1, 7, 64):
        monkeypatch.setattr("storylab.data.reading.READ_BYTES", size)
        assert stories_in(tmp_path / "a.txt") == stories
    monkeypatch.setattr("storylab.data.reading.MAX_STORY_BYTES", 50)
    with pytest.raises(UserError, match="between stories"):
        stories_in(tmp_path / "a.txt")


def test_a_parquet_column_of_numbers_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="int64, not text"):
        stories_in(tmp_path / "a.parquet")


def test_rows_of_a_split_are_counted_in_the_file(tmp_path: Path) -> None:
    """The card of tinystories-gpt4-clean gives its splits as row numbers; empty rows count."""
    pq.write_table(pa.table({"text": ["a", "", None, "b", "c", "d"]}), tmp_path / "a.parquet")
    rows = {"train": RowRange(4), "validation": RowRange(2, 4)}
    files = {split: (tmp_path / "a.parquet",) for split in rows}
    source = FileSource("x", files, rows, {})
    for split, stories, counts in (("validation", ["b"], (1, 0)), ("train", ["c", "d"], (0, 0))):
        tally = Tally()
        assert list(clean(source.texts(split, tally), tally)) == stories
        assert (tally.null_rows, tally.blank_rows) == counts  # of the split's own rows


def test_builtin_corpus_is_deterministic_and_varied() -> None:
    stories = list(builtin.stories(0, 0, 5000))
    assert stories[123] == builtin.story(0, 123)
    assert len(set(stories)) > 4990
    assert not any("{" in story or "  " in story for story in stories)
    assert builtin.story(0, 1) != builtin.story(1, 1)


# --- tokenizers


def hugging_face_gpt2() -> Any:
    """GPT-2's tokenizer in the `tokenizers` library, from the same two files."""
    from tokenizers import Tokenizer as Other
    from tokenizers import models, pre_tokenizers

    from storylab.data.tokenizer import _gpt2_file

    paths = [str(_gpt2_file(name, None)) for name in ("encoder.json", "vocab.bpe")]
    other = Other(models.BPE.from_file(*paths))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return other


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
    """Nor the validation stories that stand in the training files as well."""
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
    from storylab.data.tokenizer import _gpt2_file

    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(_gpt2_file(name, None), tmp_path / name)
    assert gpt2_tokenizer(tmp_path).vocab_size == 50257
    with open(tmp_path / "vocab.bpe", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="SHA-256"):
        gpt2_tokenizer(tmp_path)


# --- ids cannot overflow


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
    with pytest.raises(UserError, match="overflow"):
        load_dataset(folder)


# --- the prepared data set


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


def test_counts_duplicates_and_overlap(tmp_path: Path) -> None:
    tokenizer = gpt2_tokenizer()
    shared = ("Only here. " * 9).strip()
    data = write(tmp_path / "a", [*STORIES, shared], tokenizer)
    train = data.manifest["splits"]["train"]
    assert (train["stories"], train["duplicate_stories"]) == (4, 1)
    assert train["text_bytes"] == sum(len(s.encode()) for s in STORIES)
    assert data.manifest["overlap"] == {"train_stories_in_validation": 1, "left_out": True}
    kept = write(tmp_path / "b", [*STORIES, shared], tokenizer, keep=True)
    assert kept.manifest["splits"]["train"]["stories"] == 5
    assert kept.manifest["overlap"] == {"train_stories_in_validation": 1, "left_out": False}


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    tokenizer = gpt2_tokenizer()
    one, same = (write(tmp_path / n, STORIES, tokenizer).fingerprint for n in "ab")
    other = write(tmp_path / "c", STORIES[:3], tokenizer).fingerprint
    assert one == same != other


def test_preparing_twice_finds_what_is_there(tmp_path: Path) -> None:
    config = PrepareConfig(
        source="builtin", tokenizer="bpe:300", out=tmp_path / "d", builtin_stories=60
    )
    first = prepare(config)
    written = (tmp_path / "d" / "manifest.json").stat().st_mtime_ns
    assert prepare(config).fingerprint == first.fingerprint
    assert (tmp_path / "d" / "manifest.json").stat().st_mtime_ns == written
    other = PrepareConfig(
        source="builtin", tokenizer="bpe:301", out=tmp_path / "d", builtin_stories=60
    )
    with pytest.raises(UserError, match="another data set"):
        prepare(other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("precious")
    with pytest.raises(UserError, match="not a data set"):
        prepare(PrepareConfig(source="builtin", out=tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.doc").read_text() == "precious"


def test_two_processes_cannot_prepare_one_folder(tmp_path: Path) -> None:
    config = PrepareConfig(source="builtin", builtin_stories=60, out=tmp_path / "d")
    (tmp_path / ".d.partial").mkdir()
    with exclusive(tmp_path / ".d.partial"), pytest.raises(UserError, match="another process"):
        prepare(config)
    assert prepare(config).vocab_size == 50257


def test_places_that_cannot_be_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for out in (Path("file"), Path()):
        with pytest.raises(UserError, match="--out"):
            prepare(PrepareConfig(source="builtin", builtin_stories=60, out=out))


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
@pytest.mark.parametrize(
    "file", ["train-00000.bin", "validation.stories.npy", "tokenizer.tiktoken", "manifest.json"]
)
def test_damaged_data_is_refused(dataset: Dataset, tmp_path: Path, file: str, how: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset.folder, folder)
    assert load_dataset(folder).fingerprint == dataset.fingerprint
    damage(folder / file, how)
    with pytest.raises(UserError):
        load_dataset(folder)


@pytest.mark.slow
def test_a_killed_preparation_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    out = tmp_path / "data"
    command = [sys.executable, "-m", "storylab", "prepare", "--source", "builtin"]
    command += ["--builtin_stories", "200000", "--out", str(out)]
    for delay in (0.3, 0.6, 1.0):
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        while not (tmp_path / ".data.partial" / "tokenizer.tiktoken").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
    config = PrepareConfig(source="builtin", builtin_stories=60, out=out)
    assert prepare(config).manifest["splits"]["train"]["stories"] == 57
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"  \n<|endoftext|>\n", "no training stories"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "byte 3 .*save it as UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{oops\n', "line 2"),
        ("other.jsonl", b'{"body": "a"}\n', '"text"'),
        ("bad.parquet", b"PAR1 not really", "cannot read"),
        ("bad.jsonl.gz", b"\x1f\x8b nonsense", "cannot read"),
        ("a.pdf", b"", "no known kind"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("A story.")
    config = PrepareConfig(
        train=(tmp_path / name,), validation=(tmp_path / "good.txt",), out=tmp_path / "out"
    )
    with pytest.raises(UserError, match=message):
        prepare(config)
    assert not (tmp_path / "out").exists()


# --- batches


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.text(max_size=5))
def test_permutation_is_one(length: int, key: str) -> None:
    order = permutation(length, key)
    assert sorted(order.tolist()) == list(range(length))
    assert np.array_equal(order, permutation(length, key))


def test_permutation_has_no_visible_order() -> None:
    order = permutation(20_000, "a")
    assert abs(np.corrcoef(np.arange(20_000), order)[0, 1]) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, permutation(20_000, "b"))[0, 1]) < 0.03


def counting_split(length: int) -> Split:
    ids = np.arange(length, dtype=np.uint16)
    return Split("train", (ids,), (0, length), np.array([[0, 0], [length, length]]))


@settings(max_examples=40, deadline=None)
@given(st.integers(10, 400), st.integers(1, 9), st.integers(1, 30), st.integers(0, 3))
def test_every_window_once_per_epoch(length: int, block: int, sequences: int, seed: int) -> None:
    batches = TrainingBatches(counting_split(length), "f", seed, block, sequences)
    per_epoch = batches.windows_per_epoch
    assert per_epoch == (length - 1) // block
    targets = {w * block + i for w in range(per_epoch) for i in range(1, block + 1)}
    assert batches.unseen == length - 1 - len(targets)
    iterations = -(-2 * per_epoch // sequences)
    windows = np.concatenate([batches.windows(i) for i in range(iterations)])
    first, second = windows[:per_epoch], windows[per_epoch : 2 * per_epoch]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(per_epoch))


def test_a_batch_is_a_function_of_fingerprint_seed_and_iteration() -> None:
    def make(fingerprint: str = "f", seed: int = 1) -> TrainingBatches:
        return TrainingBatches(counting_split(2000), fingerprint, seed, 8, 12)

    batches = make()
    later_first = [batches(i) for i in (40, 3, 0)]
    assert torch.equal(later_first[1], make()(3))
    batch = later_first[1]
    assert batch.shape == (12, 9)
    assert torch.equal(batch[:, 1:], batch[:, :-1] + 1)  # targets are the next tokens
    assert not torch.equal(batch, make(seed=2)(3))
    assert not torch.equal(batch, make(fingerprint="g")(3))


def test_prefetching_changes_nothing() -> None:
    batches = TrainingBatches(counting_split(2000), "f", 1, 8, 12)
    prefetcher = Prefetcher(batches)
    for i in (0, 1, 2, 7, 8, 3):
        assert torch.equal(prefetcher(i), batches(i))
    prefetcher.close()


def test_evaluation_windows_are_fixed_and_spread() -> None:
    split = counting_split(1001)
    starts = evaluation_windows(split, 10, 25)
    assert starts.tolist() == list(range(0, 1000, 40))
    assert evaluation_windows(split, 10, 500).tolist() == list(range(0, 1000, 10))


def test_base64_of_the_tokenizer_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "t.tiktoken"
    path.write_bytes(base64.b64encode(b"a") + b" 0\n" + base64.b64encode(b"b") + b" 7\n")
    with pytest.raises(UserError, match="out of order"):
        load_tokenizer(path, "x")
    path.write_bytes(b"not base64! 0\n")
    with pytest.raises(UserError, match="not a"):
        load_tokenizer(path, "x")


def test_windows_are_the_same_across_shards() -> None:
    """Against slices of the tokens as one array; shards shorter than a window too."""
    tokens = np.random.default_rng(0).integers(0, 60_000, 1000).astype(np.uint16)
    cuts = [0, 400, 403, 404, 900, 1000]
    shards = tuple(tokens[a:b] for a, b in itertools.pairwise(cuts))
    split = Split("train", shards, tuple(cuts), np.zeros((2, 2), dtype=np.int64))
    starts = np.random.default_rng(1).permutation(1000 - 33)[:300]
    found = split.windows(starts, 33)
    assert found.dtype == np.int64
    assert all(
        np.array_equal(row, tokens[s : s + 33]) for row, s in zip(found, starts, strict=True)
    )
