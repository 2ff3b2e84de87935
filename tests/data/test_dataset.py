"""Damage to a prepared data set is found when it is opened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from storylab.data.dataset import (
    Dataset,
    load_dataset,
)
from storylab.errors import UserError


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
