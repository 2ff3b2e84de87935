"""Fingerprints of data sets, of this version and of earlier ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from record_folders import forget_checksums
from story_files import TEXT, data_from, described
from storylab.data.dataset import load_dataset
from storylab.data.prepare import PrepareConfig, prepare


@pytest.mark.slow
def test_what_reading_changed_is_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    for name, line_end in (("lf", "\n"), ("crlf", "\r\n")):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "a.txt"
        path.write_bytes(TEXT.replace("\n", line_end).encode())
        data_from(tmp_path / name, path)
    lf, crlf = (load_dataset(tmp_path / name / "out") for name in ("lf", "crlf"))
    assert lf.fingerprint == crlf.fingerprint
    assert lf.manifest["reading"] != crlf.manifest["reading"]


def test_data_of_earlier_versions_is_still_taken(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    data = data_from(tmp_path, tmp_path / "a.txt")
    forget_checksums(data.folder)
    old = {key: value for key, value in data.manifest.items() if key != "reading"}
    (data.folder / "manifest.json").write_text(json.dumps(old))
    again = data_from(tmp_path, tmp_path / "a.txt")
    assert again.manifest == old and again.fingerprint == data.fingerprint
    assert len(described(again)) == 6


def test_known_fingerprints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were before reading was checked: ordinary text has to give the same data. Where no test split
    is cut, they are those of versions without one."""
    config = PrepareConfig(source="builtin", tokenizer="bpe:300", builtin_stories=300)
    cut = prepare(dataclasses.replace(config, out=tmp_path / "cut"))
    assert cut.fingerprint == "967683247b219701487e34d1e1d8fcd266acac84963ba2f5b5d1a83422fb0834"
    monkeypatch.setattr("storylab.data.held_out.LEAST_STORIES", 300)
    whole = prepare(dataclasses.replace(config, out=tmp_path / "whole"))
    assert whole.fingerprint == "9e52854339d0e3619c3b19f55eb4dd790d2f3acfef88046830780cf3bbe98d8c"
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    assert data_from(tmp_path, tmp_path / "a.txt").fingerprint == KNOWN


KNOWN = "b847d56ef670afe1d7753111e2171fc976583eb2e580b4a216e4c5250ad5bcf7"
