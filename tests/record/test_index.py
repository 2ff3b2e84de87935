"""Listings read the summary alone, and no file twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from record_folders import Opened, folders, forget_checksums
from storylab.errors import UserError
from storylab.record.index import RunCache, list_runs
from storylab.record.run import load_run


def test_a_listing_reads_the_summary_alone(place: Path, opened: Opened) -> None:
    with opened.under(place) as count:
        entries = list(list_runs(place / "runs"))
    assert [Path(path).name for path in count] == ["summary.json"] * 4
    for entry, folder in zip(entries, folders(place), strict=True):
        run = load_run(folder)
        assert (entry.name, entry.state, entry.started) == (
            *(folder.name, "finished"),
            run.environment.started,
        )
        assert (entry.loss, entry.speed) == (run.loss, run.speed)
        assert (entry.parameters, entry.tokens) == (run.parameters, run.results.tokens)
        assert run.results.training_memory_bytes == run.training_memory


def test_summaries_of_an_earlier_version_are_listed_from_the_rows(place: Path) -> None:
    forget_checksums(place)
    before = list(list_runs(place / "runs"))
    for folder in folders(place):
        path = folder / "summary.json"
        summary = json.loads(path.read_text())
        for name in ("started", "median_tokens_per_second", "training_memory_bytes"):
            del summary[name]
        path.write_text(json.dumps(summary))
    assert list(list_runs(place / "runs")) == before


def test_a_listing_looks_for_the_files_that_it_does_not_read(place: Path) -> None:
    first, second, *_ = folders(place)
    (first / "story_losses.npy").unlink()
    (second / "config.json").unlink()
    (second / "config.json").mkdir()
    found = {entry.name: entry for entry in list_runs(place / "runs")}
    assert found[first.name].state == found[second.name].state == "damaged"
    assert "story_losses.npy is missing" in found[first.name].fault
    assert "config.json: it is a folder" in found[second.name].fault


def test_a_cache_reads_again_only_after_a_change(place: Path, opened: Opened) -> None:
    folder, cache = folders(place)[0], RunCache()
    assert cache.state(folder) == ("finished", "")
    run = cache.load(folder)
    with opened.under(place) as count:
        assert cache.load(folder) is run and cache.head(folder).config == run.config
        assert cache.state(folder) == ("finished", "")
    assert not count
    (folder / "summary.json").write_text("{}")
    assert cache.state(folder)[0] == "damaged"
    with pytest.raises(UserError, match=r"summary\.json is damaged: status: is missing"):
        cache.load(folder)
    (folder / "summary.json").unlink()
    assert cache.state(folder) == ("unfinished", "")
    shutil.rmtree(folder)
    assert cache.state(folder) == ("new", "")
