"""`storylab completion`: the shells themselves complete verbs, flags and choices with the script."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from storylab.cli import main
from storylab.cli.parsers import verb_parser
from storylab.cli.registry import Verb, all_verbs
from storylab.config import TrainConfig
from storylab.config.marks import marks_of

pytest.importorskip("shtab", reason="the extra completion is not installed")

# Prints the completions of the last word of its arguments, as readline would ask for them.
ASK_BASH = r"""
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
complete_function=$(complete -p storylab | sed 's/.*-F \([^ ]*\) .*/\1/')
$complete_function storylab "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\n' "${COMPREPLY[@]}"
"""


def script(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", shell]) == 0
    path = folder / f"completion.{shell}"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    return path


@pytest.mark.posix
def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script("bash", tmp_path, capsys)
    (tmp_path / "runs/first").mkdir(parents=True)

    def completed(*words: str) -> set[str]:
        command = ["bash", "-c", ASK_BASH, "bash", str(path), "storylab", *words]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert result.stderr == ""
        return set(result.stdout.split())

    assert completed("") == {verb.name.split()[0] for verb in all_verbs()}
    assert completed("tr") == {"train"}
    assert completed("experiment", "") == {"run", "new", "confirm", "report"}
    assert completed("experiment", "run", "--sca") == {"--scale"}
    assert completed("train", "--dtype", "fp8") == {"fp8", "fp8-current", "fp8-rowwise"}
    assert completed("train", "--resume", "--pres") == {"--preset"}
    flags = {f"--{name}" for name in marks_of(TrainConfig)}
    assert flags <= completed("train", "--")
    assert completed("completion", "") == {"bash", "zsh", "fish"}
    assert {path.rstrip("/") for path in completed("resume", "runs/f")} == {"runs/first"}


@pytest.mark.posix
def test_fish_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not shutil.which("fish"):
        pytest.skip("fish is not installed")
    path = script("fish", tmp_path, capsys)

    def completed(line: str) -> set[str]:
        ask = f"source {path}; complete -C '{line}'"
        result = subprocess.run(["fish", "-c", ask], capture_output=True, text=True, check=True)
        return {row.partition("\t")[0] for row in result.stdout.splitlines()}

    assert completed("storylab tr") == {"train"}
    assert {"run", "confirm"} <= completed("storylab experiment ")
    assert completed("storylab train --dtype fp8-") == {"fp8-current", "fp8-rowwise"}


@pytest.mark.posix
def test_zsh_accepts_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not shutil.which("zsh"):
        pytest.skip("zsh is not installed")
    path = script("zsh", tmp_path, capsys)
    subprocess.run(["zsh", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#compdef storylab") and "--gradient_accumulation_steps[" in text


@pytest.mark.parametrize("verb", all_verbs(), ids=lambda verb: verb.name)
def test_a_verb_names_the_dataclass_that_it_parses(
    verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its help has every flag of the parser that completion and reference are made from."""
    with pytest.raises(SystemExit):
        main([*verb.name.split(), "--help"])
    text = capsys.readouterr().out
    options = [flag for action in verb_parser(verb)._actions for flag in action.option_strings]
    assert options and all(flag in text for flag in options)


def test_without_the_library_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("storylab.cli.verbs.completion.find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'storylab[completion]'" in capsys.readouterr().err
