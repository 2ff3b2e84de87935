"""A few changed files of every kind; `benchmarks/fuzz.py` tries very many."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from fuzz_changes import change_bytes
from fuzz_targets import Example, targets
from storylab.data.dataset import MANIFEST, TOKENIZER_FILE, fingerprint, load_dataset
from storylab.data.tokenizer import load_tokenizer
from storylab.decode import convert
from storylab.errors import UserError

INPUTS = 40


@pytest.mark.slow
def test_changed_files_are_read_or_refused_in_one_line(whole: Example, tmp_path: Path) -> None:
    """Anything but a UserError fails."""
    tried = refused = 0
    for name, target in targets(whole, tmp_path).items():
        draw = random.Random(name)
        for seed in target.seeds:
            target.read(seed)
        for number in range(INPUTS):
            seed = target.seeds[number % len(target.seeds)]
            changed = (target.change if number % 2 and target.change else change_bytes)(seed, draw)
            tried += 1
            try:
                target.read(changed)
            except UserError as error:
                refused += 1
                assert str(error).strip(), name
            except Exception as error:
                raise AssertionError(f"{name}: {changed[:2000]!r}") from error
    assert tried > 800 and refused > tried / 3


def made_up(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of a data set and give it the fingerprint of the change."""
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    values["fingerprint"] = fingerprint(values)
    (folder / MANIFEST).write_text(json.dumps(values))
    (folder / "SHA256SUMS").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "name", ["../train-00000.bin", "/etc/passwd", "..", "a/b", "", "a\\b", "C:x"]
)
@pytest.mark.parametrize("key", ["shard", "stories"])
def test_no_name_in_a_manifest_leads_out_of_its_folder(
    example: Example, name: str, key: str
) -> None:
    """Even to a file that has the right content."""

    def change(values: dict[str, Any]) -> None:
        split = values["splits"]["train"]
        if key == "shard":
            split["shards"][0]["file"] = name
        else:
            split["stories_file"] = name

    outside = example.data.parent / "train-00000.bin"
    outside.write_bytes((example.data / "train-00000.bin").read_bytes())
    made_up(example.data, change)
    with pytest.raises(UserError, match=r"manifest\.json is damaged: splits\.train\."):
        load_dataset(example.data)


STORIES = "train.stories.npy"


@pytest.mark.parametrize(
    "table",
    [
        np.zeros((0, 2), np.int64),
        np.zeros((5, 2), np.int64),
        np.array([[0, 0], [10**15, 5]]),
        np.array([[0, 0], [-1, 0]]),
        np.zeros((3, 2), np.float64),
        np.zeros(7, np.int64),
        np.array([{}, []], dtype=object),
        "a header that asks for more than there is memory",
    ],
)
def test_a_made_up_table_of_stories_is_refused(example: Example, table: Any) -> None:
    path = example.data / STORIES
    with open(path, "wb") as file:
        if isinstance(table, str):
            header = {"descr": "<i8", "fortran_order": False, "shape": (10**15, 2)}
            np.lib.format.write_array_header_1_0(file, header)
        else:
            np.save(file, table, allow_pickle=True)

    def change(values: dict[str, Any]) -> None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        values["splits"]["train"].update(stories_file=STORIES, stories_sha256=digest)

    made_up(example.data, change)
    with pytest.raises(UserError, match=STORIES):
        load_dataset(example.data)


def test_a_shard_of_another_size_is_refused(example: Example) -> None:
    """Half an id at the end, and a manifest that counts other tokens."""
    path = example.data / "train-00000.bin"
    path.write_bytes(path.read_bytes() + b"\0")

    def change(values: dict[str, Any]) -> None:
        shard = values["splits"]["train"]["shards"][0]
        shard["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

    made_up(example.data, change)
    with pytest.raises(UserError, match=r"train-00000\.bin has not the"):
        load_dataset(example.data)


@pytest.mark.parametrize("tokens", [["YQ==", "YQ=="], ["", "YQ=="], ["YQ=="]])
def test_a_vocabulary_that_cannot_encode_is_refused(tmp_path: Path, tokens: list[str]) -> None:
    """A token twice, an empty one, bytes that are missing: the encoder ends in a panic for each."""
    path = tmp_path / TOKENIZER_FILE
    path.write_text("".join(f"{token} {rank}\n" for rank, token in enumerate(tokens)))
    with pytest.raises(UserError, match="prepare the data again"):
        load_tokenizer(path, "bpe")


def test_half_a_surrogate_pair_is_one_line() -> None:
    """A type with names to choose from compares in UTF-8."""
    with pytest.raises(UserError, match="here is damaged: it has half of a surrogate pair"):
        convert(Literal["uint16"], "\ud800", "here")  # type: ignore[arg-type]


def test_a_repeated_change_is_the_same() -> None:
    """A finding can be made again from its number."""
    for number in range(50):
        first, second = (change_bytes(b"0123456789", random.Random(number)) for _ in range(2))
        assert first == second
