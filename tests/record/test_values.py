"""Checksums, strict decoding and arrays, each by itself: against sha256sum, known messages, and numpy."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import Struct

from storylab.checksums import (
    CHECKSUMS,
    add_checksums,
    drop_checksums,
    read_checksums,
    sha256_file,
    write_checksums,
)
from storylab.decode import LARGEST_INT, convert, decode, fault, is_unicode, shown
from storylab.errors import UserError
from storylab.record.arrays import read_array, write_array


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three files and their checksums."""
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.json", "sub/c.bin"):
        (tmp_path / name).write_text(name)
    add_checksums(tmp_path, ["b.txt", "a.json", "sub/c.bin"])
    return tmp_path


def test_another_program_verifies_the_checksums(folder: Path) -> None:
    lines = (folder / CHECKSUMS).read_text().splitlines()
    assert [line[66:] for line in lines[:-1]] == ["a.json", "b.txt", "sub/c.bin"]
    assert lines[0][:64] == hashlib.sha256(b"a.json").hexdigest() == sha256_file(folder / "a.json")
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--check", "--quiet", CHECKSUMS]
        assert subprocess.run(command, cwd=folder, check=False).returncode == 0


def test_checksums_are_added_renewed_and_dropped(folder: Path) -> None:
    (folder / "a.json").write_text("new")
    (folder / "d").write_text("d")
    add_checksums(folder, ["a.json", "d"])
    sums = read_checksums(folder).sums
    assert sums.keys() == {"a.json", "b.txt", "sub/c.bin", "d"}
    assert sums["a.json"] == hashlib.sha256(b"new").hexdigest()
    drop_checksums(folder, ["b.txt", "d", "was never there"])
    assert read_checksums(folder).sums.keys() == {"a.json", "sub/c.bin"}
    before = (folder / CHECKSUMS).stat()
    drop_checksums(folder, ["b.txt"])
    assert (folder / CHECKSUMS).stat().st_mtime_ns == before.st_mtime_ns
    drop_checksums(folder / "sub", ["c.bin"])
    assert not (folder / "sub" / CHECKSUMS).exists()


def test_only_what_has_another_checksum_is_refused(folder: Path) -> None:
    sums = read_checksums(folder)
    sums.require("a.json", b"a.json")
    sums.require("unlisted", b"anything")
    with pytest.raises(UserError, match=r"a\.json has been altered: its SHA-256 is not the one in"):
        sums.require("a.json", b"other")
    # A process that continues the run has taken it out in between.
    drop_checksums(folder, ["a.json"])
    sums.require("a.json", b"other")


def test_every_changed_byte_of_the_checksums_is_found(folder: Path) -> None:
    path = folder / CHECKSUMS
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="SHA256SUMS has been altered: its last line is not"):
            read_checksums(folder)
    path.write_bytes(whole)
    assert len(read_checksums(folder).sums) == 3


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b/c", ".hidden", "a//b", "a b", "-x"])
def test_names_that_lead_elsewhere_are_not_read(tmp_path: Path, name: str) -> None:
    write_checksums(tmp_path, {name: "0" * 64})
    with pytest.raises(UserError, match="has been altered"):
        read_checksums(tmp_path)


class Inner(Struct, frozen=True):
    seed: int


class Outer(Struct, frozen=True):
    cells: list[Inner]
    name: str = ""
    place: Path = Path()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"cells": [{"seed": 1}, {"seed": "x"}]}, "cells[1].seed: expected `int`, got `str`"),
        ({"cells": [{}]}, "cells[0].seed: is missing"),
        ({}, "cells: is missing"),
        ([], "expected `object`, got `array`"),
        ({"cells": [], "name": 3}, "name: expected `str`, got `int`"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        decode(Outer, json.dumps(value).encode(), "file.json")
    assert str(caught.value) == f"file.json is damaged: {message}"
    with pytest.raises(UserError) as caught:
        convert(Outer, value, "file.json")
    assert str(caught.value) == f"file.json is damaged: {message}"


def test_what_is_right_is_read_and_unknown_keys_are_left() -> None:
    data = b'{"cells": [{"seed": 7, "later": 1}], "more": null}'
    assert decode(Outer, data, "") == Outer([Inner(7)])
    found = convert(Outer, {"cells": [], "place": "a/b"}, "")
    assert found == Outer([], place=Path("a/b"))
    with pytest.raises(UserError, match="expected text, got 3"):
        convert(Outer, {"cells": [], "place": 3}, "file.json")


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"cells": [}', b"\xff", b'{"more": ' + b"[" * 100_000]
)
def test_what_is_no_json_is_told(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^file\.json is not valid JSON \(.+\): it has been alte"):
        decode(Outer, data, "file.json")


def test_half_of_a_surrogate_pair_is_a_question_mark() -> None:
    data = b'{"cells": [], "name": "a\\ud800b\\UD83D\\ude00"}'.replace(b"\\U", b"\\u")
    assert decode(Outer, data, "").name == "a?b\N{GRINNING FACE}"
    with pytest.raises(UserError, match="not valid JSON"):
        decode(Outer, b'{"name": "\\ud800"', "file.json")
    assert is_unicode("caf\u00e9") and is_unicode("plain") and not is_unicode("caf\ud800")
    assert is_unicode("\ud7ff\ue000") and not is_unicode("\udfff")


def test_values_in_messages_are_short_and_on_one_line() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 1000)) <= 42 and len(shown(10**500)) <= 42
    assert shown([1, [2]]) == "[1, [2]]"
    assert fault(RecursionError()) == "nested too deep"
    assert np.iinfo(np.int64).max == LARGEST_INT  # torch and numpy count with these


@pytest.mark.parametrize("array", [np.array([1.0, -2.5]), np.zeros((0, 2)), np.ones((2, 3))])
def test_arrays_come_back(tmp_path: Path, array: np.ndarray) -> None:
    path = tmp_path / "x.npy"
    write_array(path, array)
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), array)
    np.testing.assert_array_equal(read_array(path, array.ndim), array)
    with pytest.raises(UserError, match=r"no whole array of float64 of [12] dimensions"):
        read_array(path, 3 - array.ndim)


@pytest.mark.parametrize(("number", "fine"), [(1e40, True), (1.1e40, False), (-2e40, False)])
def test_numbers_beyond_any_loss_are_damage(tmp_path: Path, number: float, fine: bool) -> None:
    path = tmp_path / "x.npy"
    write_array(path, np.array([0.0, number]))
    if fine:
        assert read_array(path, 1)[1] == number
    else:
        with pytest.raises(UserError, match="far too large"):
            read_array(path, 1)
    for odd in (math.nan, math.inf):
        write_array(path, np.array([odd]))
        with pytest.raises(UserError, match="not finite"):
            read_array(path, 1)


def test_an_array_is_checked_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    write_array(path, np.array([1.0]))
    seen: list[bytes] = []
    read_array(path, 1, seen.append)
    assert seen == [path.read_bytes()]
    np.save(path, np.array([1, 2]))
    with pytest.raises(UserError, match="no whole array of float64"):
        read_array(path, 1)
