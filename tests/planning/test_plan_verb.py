"""The command `storylab plan`: its flags, without loading torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from storylab.cli import main


@pytest.mark.parametrize(
    "code",
    [
        "import storylab.planning.roofline, storylab.planning.plan_text, storylab.cli.verbs.plan",
        "from storylab.cli import main; main(['plan', '--gpu', 'rtx5090', '--dtype', 'nvfp4'])",
    ],
)
def test_a_plan_does_not_load_torch(code: str) -> None:
    code += "; import sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "experiments/02-fp8.toml --scale record --batch-size=8 --no_compile",
            "--batch_size, --compile: experiments/02-fp8.toml",
        ),
        ("experiments/02-fp8.toml --preset nano", "--preset: "),
        ("--preset nano --scale record", "--scale: for an experiment"),
        ("--software compiled", "--software: for an experiment"),
        ("--vocab_size -1", "vocab_size is -1"),
        ("experiments/02-fp8.toml --scale record --vocab_size -1", "vocab_size is -1"),
    ],
)
def test_flags_that_a_plan_would_not_read_are_refused(
    capsys: pytest.CaptureFixture[str], flags: str, words: str
) -> None:
    assert main(["plan", *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


def test_flags_of_its_own_are_read_with_an_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "experiments/02-fp8.toml --scale record --gpu h100 --software compiled"
    assert main(["plan", *flags.split()]) == 0
    few_words = capsys.readouterr().out
    assert main(["plan", *flags.split(), "--vocab-size", "999999"]) == 0
    assert "H100 SXM, torch.compile" in few_words != capsys.readouterr().out


def test_an_experiment_is_calibrated_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiments/02-fp8.toml", "--gpu", "this"]) == 2
    assert "--dry_run" in capsys.readouterr().err
