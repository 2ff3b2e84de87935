"""What users point the commands at: every path and every file is read right, or refused in one line."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from storylab.cli import main
from storylab.config import TrainConfig
from storylab.flags import default_for, parse


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("prepare --train '' --validation v.txt", "--train"),
        ("prepare --train v.txt --validation v.txt ''", "--validation"),
        ("prepare --train v.txt --validation=", "--validation"),
        ("prepare --source builtin --out ''", "--out"),
        ("prepare --source builtin --tokenizer_dir ''", "--tokenizer_dir"),
        ("prepare --source builtin --tokenizer-dir=", "--tokenizer_dir"),
        ("train --data_dir '' --max_iters 1", "--data_dir"),
        ("train --max_iters 1 --out-dir ''", "--out_dir"),
        ("resume ''", "RUN"),
        ("resume . --data_dir ''", "--data_dir"),
        ("eval --checkpoint last ''", "RUN"),
        ("sample ''", "RUN"),
        ("compare '' .", "RUNS"),
        ("list --runs ''", "--runs"),
        ("experiment run ''", "FILE"),
        ("experiment report --out ''", "--out"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
) -> None:
    (tmp_path / "v.txt").write_text("A story.")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 2
    assert capsys.readouterr().err.startswith(f"storylab: {name} has an empty path")
    assert [path.name for path in tmp_path.iterdir()] == ["v.txt"]


def test_a_point_is_the_current_folder() -> None:
    args = ["--data_dir", ".", "--out_dir", "./a"]
    config = parse(TrainConfig, args, "x", default_for(args))
    assert (config.data_dir, config.out_dir) == (Path(), Path("a"))
