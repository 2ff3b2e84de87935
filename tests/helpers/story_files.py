"""Files of stories, and data sets made from them, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from storylab.cli.datasets import describe_dataset
from storylab.data.dataset import Dataset
from storylab.data.prepare import PrepareConfig, prepare
from storylab.data.reading import clean, read_texts
from storylab.data.tally import Tally
from storylab.errors import UserError

END = "<|endoftext|>"
STORIES = ["Tom ran.\nHe fell.", "Él comió “pan”.\n\nThe end.", "A cat sat on 1,234 mats!"]
TEXT = f"\n{END}\n".join(STORIES)


def read(path: Path) -> tuple[list[str], Tally]:
    """The stories of a file and what was counted."""
    tally = Tally()
    return list(clean(read_texts(path, tally), tally)), tally


def data_from(folder: Path, train: Path, **options: Any) -> Dataset:
    """The data set of some training files, with two short validation stories."""
    (folder / "held-out.txt").write_text(f"One.{END}Two.")
    validation = (folder / "held-out.txt",)
    out = folder / "out"
    return prepare(PrepareConfig(train=(train,), validation=validation, out=out, **options))


def refusal(folder: Path, train: Path) -> str:
    """The one line that a file or folder is refused with; nothing is left of the preparation."""
    with pytest.raises(UserError) as caught:
        data_from(folder, train)
    assert not (folder / "out").exists() and not (folder / ".out.partial").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def stories_of(data: Dataset) -> list[str]:
    ids = data.splits["train"].read(0, len(data.splits["train"]))
    return data.tokenizer.decode(ids.tolist()).split(END)[:-1]


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def described(data: Dataset) -> list[str]:
    return describe_dataset(data.folder, data.manifest)
