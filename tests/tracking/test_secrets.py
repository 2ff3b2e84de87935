"""No secret reaches the log, and what is missing is said at once."""

from __future__ import annotations

from pathlib import Path

import pytest

import storylab.tracking
from samples import MakeConfig
from storylab.cli import main
from storylab.tracking import TRACKERS, TrackerEntry
from storylab.tracking.secrets import without_secrets
from storylab.training.train import train

ENVIRONMENT = {"WANDB_API_KEY": "sesame-open-1", "DB_PASSWORD": "sesame-open", "HOME": "/home/me"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("key sesame-open-1 is wrong", "key *** is wrong"),
        ("no route to http://me:pw@host:5000/x", "no route to http://***@host:5000/x"),
        ("hf_abcdefghijkl and " + "0123456789" * 4, "*** and ***"),
        ("http://host?write_token=abc&x=1", "http://host?write_token=***&x=1"),
        ("no such file: /home/me/runs", "no such file: /home/me/runs"),
    ],
)
def test_secrets_are_hidden(text: str, expected: str) -> None:
    assert without_secrets(text, ENVIRONMENT) == expected


def test_a_missing_library_is_named_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = TrackerEntry("nowhere:Nothing", ("no_such_library",), "wandb")
    monkeypatch.setattr(storylab.tracking, "TRACKERS", {**TRACKERS, "wandb": missing})
    monkeypatch.chdir(tmp_path)
    for words in ("train", "resume runs/a", "experiment run a.toml", "sync runs/a --to wandb"):
        flags = [] if words.startswith("sync") else ["--track", "wandb"]
        assert main([*words.split(), *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        if not words.startswith("resume"):
            assert line == (
                "storylab: wandb needs the package no_such_library: pip install 'storylab[wandb]'"
            )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_has_not_ended_is_not_sent(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(tiny_config(max_iters=2)).folder
    (folder / "summary.json").unlink()
    assert main(["sync", str(folder), "--to", "tensorboard"]) == 2
    assert f"{folder} has not ended" in capsys.readouterr().err
    assert main(["sync", "--to", "tensorboard"]) == 2
    assert main(["sync", str(folder), "--to", "paper"]) == 2
