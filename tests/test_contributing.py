"""The worked examples of CONTRIBUTING.md apply to a copy of the package and pass their checks."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from storylab.data.dataset import Dataset

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(
    re.findall(r"^### (To add [^\n]*)\n(.*?)(?=^##|\Z)", TEXT, re.DOTALL | re.MULTILINE)
)


def apply(patch: str, root: Path) -> None:
    """Apply a patch of one hunk without line numbers; a new file has lines with a plus only.

    The lines with a minus and those without a sign must be in the file exactly once, one after the other.
    """
    first, *lines = patch.splitlines()
    path = root / first.removeprefix("--- ").strip()
    old = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
    new = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
    if not old:
        assert not path.exists(), f"{path} exists"
        path.write_text(new, encoding="utf-8")
        return
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path}: not there once:\n{old}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_there_is_an_example_for_each_kind() -> None:
    kinds = (
        *("a schedule", "an optimizer", "a precision", "a scaling", "a tracker", "a verb"),
        "an executor",
        "an attention pattern",
        "a check",
    )
    assert set(EXAMPLES) == {f"To add {kind}" for kind in kinds}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_works(name: str, dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/builtin-bpe1024").symlink_to(dataset.folder)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "src")}
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", EXAMPLES[name], re.DOTALL | re.MULTILINE)
    assert blocks and 2 * len(blocks) == len(re.findall(r"^```", EXAMPLES[name], re.MULTILINE))
    for language, block in blocks:
        if language == "diff":
            apply(block, tmp_path)
            continue
        commands = (
            [["-c", block]]
            if language == "python"
            else [["-m", *shlex.split(line)] for line in block.splitlines()]
        )
        for command in commands:
            result = subprocess.run(
                [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True
            )
            assert result.returncode == 0, result.stderr


def test_the_tour_names_files_that_exist() -> None:
    tour = TEXT.partition("Four ideas")[0]
    names = re.findall(r"^\d\. `([^`]+)`", tour, re.MULTILINE)
    assert len(names) == 6
    for name in names:
        assert (ROOT / "src/storylab" / name).is_file(), name
