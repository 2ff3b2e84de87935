"""Files and checksums of a run agree at every moment, whatever a kill interrupts."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from finished_runs import InterruptAt, metrics, weights
from samples import MakeConfig
from storylab.checksums import read_checksums
from storylab.errors import Interrupted
from storylab.record.run import load_run
from storylab.record.stages import files_of
from storylab.training.observers import Observer
from storylab.training.resume import resume
from storylab.training.train import train


class Killed(BaseException):
    """Ends this process's work where a kill would."""


@pytest.mark.slow
def test_a_kill_before_any_rename_leaves_a_run_that_goes_on(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is written by a rename, so these are all the moments between two states of the folder."""
    whole = train(tiny_config(out_dir=tmp_path / "whole"))
    stopped = tiny_config(out_dir=tmp_path / "stopped")
    with pytest.raises(Interrupted):
        train(stopped, InterruptAt(6, signal.SIGTERM))
    rename, left = os.replace, 0

    def limited(*args: Any) -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        rename(*args)

    killed = 0
    while True:
        folder = tmp_path / f"killed-{killed}"
        shutil.copytree(stopped.out_dir, folder)
        left = killed
        monkeypatch.setattr(os, "replace", limited)
        try:
            resume(folder)
        except Killed:
            killed += 1
        else:
            break
        finally:
            monkeypatch.setattr(os, "replace", rename)
        load_run(folder)  # no file is taken for an altered one
        again = resume(folder)
        assert weights(again) == weights(whole) and metrics(again) == metrics(whole)
    assert killed > 8


@pytest.mark.slow
def test_a_run_that_has_ended_has_a_checksum_of_every_file(tiny_config: MakeConfig) -> None:
    """Also of a log that grew after the end, where an observer fails."""

    class Fails(Observer):
        def end(self, summary: object) -> None:
            raise ValueError("no room")

    run = train(tiny_config(), Fails())
    assert "no room" in (run.folder / "log.txt").read_text()
    assert read_checksums(run.folder).sums.keys() == set(files_of(run.folder))
    assert load_run(run.folder).finished
