"""Every command in the README runs as it stands there, on a scale that a test can afford."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from storylab.cli.verbs.train import TrainCommand
from storylab.data import builtin
from storylab.data.sources import HUB_DATASETS
from storylab.experiments.spec import KEYS, load_experiment
from storylab.flags import default_for, parse

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
]
# .ci/run calls these two; the hub's verbs run against a local server in test_hub.py; the record's
# own command takes a GPU 19 minutes.
ELSEWHERE = {
    "make demo",
    "make test",
    "storylab prepare",
    "storylab prepare --source tinystories-v2 --tokenizer bpe:4096",
    "python train_tinystories.py --dtype bfloat16 --max_iters 1000",
    # Half an hour; test_experiments.py loads the file and runs smaller ones.
    "storylab experiment run experiments/04-sliding-window.toml --scale laptop",
}
SHORTER = {"--max_iters": "20", "--eval_interval": "10"}


def shortened(command: str) -> list[str]:
    words = shlex.split(command)
    for flag, value in SHORTER.items():
        if flag in words:
            words[words.index(flag) + 1] = value
    if words[:2] == ["storylab", "doctor"]:
        words += ["--presets", "nano"]
    return [sys.executable, "-m", *words]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's examples name: the experiment files and some stories."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "stories").mkdir()
    (folder / "experiments").symlink_to(ROOT / "experiments")
    import gzip
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    stories = list(builtin.stories(0, 0, 30))
    pq.write_table(pa.table({"text": stories[:10]}), folder / "stories/a.parquet")
    (folder / "stories/b.txt").write_text("<|endoftext|>".join(stories[10:20]))
    rows = "".join(json.dumps({"text": s}) + "\n" for s in stories[20:])
    (folder / "stories/held-out.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    return folder


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ELSEWHERE])
def test_readme_command(command: str, place: Path) -> None:
    """In the README's order: later commands use what earlier ones made."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if command.startswith("storylab experiment run"):
        small = (place / "mine.toml").read_text().replace("max_iters = 300", "max_iters = 20")
        (place / "mine.toml").write_text(small)
    result = subprocess.run(shortened(command), cwd=place, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_readme_python(place: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        subprocess.run([sys.executable, "-c", code], cwd=place, check=True)


def test_the_readmes_experiment_loads(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "a.toml").write_text(text)
    assert load_experiment(tmp_path / "a.toml").arms == ("0.1", "0")
    keys = re.findall(r"^\| `(?:\[+)?(\w+)", TEXT.partition("| key | meaning |")[2], re.MULTILINE)
    for key in KEYS - {"config", "hypothesis", "purpose", "note", "waits_for"}:
        assert key in keys, key


def test_the_commands_that_run_elsewhere_are_in_the_readme() -> None:
    assert set(COMMANDS) >= ELSEWHERE
    record = parse(TrainCommand, shlex.split(COMMANDS[2])[2:], "x", TrainCommand(default_for([])))
    assert record.config.max_iters == 1000
    for name in HUB_DATASETS:
        assert f"`{name}`" in TEXT


def test_every_source_file_is_on_the_map() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for path in (ROOT / "src/storylab").rglob("*.py"):
        # A verb's file has the name of the verb.
        if not path.name.startswith("__") and path.parent.name != "verbs":
            assert f"`{path.name}`" in text, path
