"""A changed byte is found where the file is used, and the file is named.

tests/verify has the same for `storylab verify`, tests/training/test_checkpointing.py for more of a
checkpoint, tests/training/test_resume.py for the checkpoint before a damaged one.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bit_rot import unnoticed, uses
from fuzz_targets import Example
from storylab.cli import main

PLACES = 12


@pytest.mark.slow
def test_a_changed_byte_is_named_where_the_file_is_used(example: Example) -> None:
    """At some places of every file; `benchmarks/bit_rot.py` tries all."""
    names = set()
    for path, use in uses(example):
        use()
        draw, size = random.Random(path.name), path.stat().st_size
        places = {0, size - 1, *(draw.randrange(size) for _ in range(PLACES))}
        assert not list(unnoticed(path, use, places, draw)), path.name
        names.add(path.name)
    assert names >= {
        *(
            "config.json",
            "data.json",
            "environment.json",
            "summary.json",
            "metrics.jsonl",
            "precision.json",
        ),
        *(
            "story_losses.npy",
            "position_losses.npy",
            "test_losses.npy",
            "tokenizer.tiktoken",
            "SHA256SUMS",
        ),
        *(
            "best.safetensors",
            "last.safetensors",
            "manifest.json",
            "train-00000.bin",
            "test.stories.npy",
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "file"),
    [
        ("resume", "config.json"),
        ("resume", "metrics.jsonl"),
        ("resume", "train-00000.bin"),
        ("eval", "checkpoints/last.safetensors"),
        ("eval", "validation.stories.npy"),
        ("sample", "tokenizer.tiktoken"),
        ("sample", "checkpoints/last.safetensors"),
        ("noise", "summary.json"),
        ("report", "story_losses.npy"),
        ("verify", "data.json"),
        ("export", "config.json"),
    ],
)
def test_the_command_names_the_file_in_one_line(
    example: Example, capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str, file: str
) -> None:
    run, runs, data = str(example.run), str(example.run.parent), ["--data_dir", str(example.data)]
    path = next(p for p in (example.run / file, example.data / file) if p.exists())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    args = {
        "resume": ["resume", run, *data],
        "eval": ["eval", run, "--device", "cpu", *data],
        "sample": ["sample", run, "--device", "cpu", "--max_new_tokens", "2"],
        "noise": ["noise", run],
        "report": ["experiment", "report", "--runs", runs],
        "verify": ["verify", run, "--depth", "files"],
        "export": ["export", run, "--format", "hf", "--out", str(tmp_path / "out")],
    }[verb]
    code = main(args)
    captured = capsys.readouterr()
    text = captured.out + captured.err
    if verb == "report":  # one damaged run does not keep the others out of it
        text += (example.run.parent / "report" / "EXPERIMENTS.md").read_text(encoding="utf-8")
        assert code == 0
    else:
        assert code == (1 if verb == "verify" else 2)
    assert Path(file).name in text and "Traceback" not in text
    assert captured.err.count("\n") <= 1
