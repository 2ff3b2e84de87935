"""Every command in the README and the guide runs as it is printed, on a scale that a test can afford."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storylab.cli import main
from storylab.cli.verbs.train import TrainCommand
from storylab.data import builtin
from storylab.data.sources import HUB_DATASETS
from storylab.experiments.spec import KEYS, load_experiment
from storylab.flags import default_for, parse

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guide"
# A page may use what the README and the training page made, so these two come first.
FIRST = [ROOT / "README.md", GUIDE / "training.md"]
PAGES = [*FIRST, *sorted(set(GUIDE.glob("*.md")) - set(FIRST))]


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


COMMANDS: list[tuple[str, str]] = []
for _page in PAGES:
    for _line in "".join(blocks(_page, "bash")).splitlines():
        # A run folder is written once: a page that repeats a training command has the run already.
        if not (_line.startswith("storylab train ") and _line in [line for _, line in COMMANDS]):
            COMMANDS.append((_page.stem, _line))
ORIGINAL = "python train_tinystories.py --dtype bfloat16 --max_iters 1000"
# .ci/run calls the first two, and make installs with pip; the hub's verbs run against a local server in
# test_hub.py; the original log's command takes a GPU 19 minutes.
ELSEWHERE = {
    "make demo",
    "make test",
    "pip install --constraint constraints.txt .",
    "storylab prepare",
    "storylab prepare --source tinystories-v2 --tokenizer bpe:4096",
    ORIGINAL,
    # Needs an extra that is too large for every machine; tests/quality/test_harness.py runs it.
    "storylab eval runs/first --tasks last_word endings",
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
    """A folder with the files that the examples name: the experiment files and some stories."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "stories").mkdir()
    (folder / "experiments").symlink_to(ROOT / "experiments")
    stories = list(builtin.stories(0, 0, 30))
    pq.write_table(pa.table({"text": stories[:10]}), folder / "stories/a.parquet")
    (folder / "stories/b.txt").write_text("<|endoftext|>".join(stories[10:20]))
    rows = "".join(json.dumps({"text": s}) + "\n" for s in stories[20:])
    (folder / "stories/held-out.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if c[1] not in ELSEWHERE])
def test_command(page: str, command: str, place: Path) -> None:
    """In the order of the pages: later commands use what earlier ones made."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if command.startswith("storylab experiment run"):
        small = (place / "mine.toml").read_text().replace("max_iters = 300", "max_iters = 20")
        (place / "mine.toml").write_text(small)
    result = subprocess.run(shortened(command), cwd=place, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python(page: Path, place: Path) -> None:
    for code in blocks(page, "python"):
        subprocess.run([sys.executable, "-c", code], cwd=place, check=True)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_link_leads_somewhere() -> None:
    pages = [*PAGES, ROOT / "ARCHITECTURE.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_experiment_of_the_guide_loads(tmp_path: Path) -> None:
    page = GUIDE / "experiments.md"
    text, crossed = blocks(page, "toml")
    (tmp_path / "a.toml").write_text(text)
    assert load_experiment(tmp_path / "a.toml").arms == ("0.1", "0")
    (tmp_path / "b.toml").write_text(crossed)
    assert "qk_norm=on, rate=low" in load_experiment(tmp_path / "b.toml").arms
    table = page.read_text(encoding="utf-8").partition("| key | meaning |")[2]
    keys = re.findall(r"^\| `(?:\[+)?(\w+)", table, re.MULTILINE)
    for key in KEYS - {"config", "hypothesis", "purpose", "note", "waits_for"}:
        assert key in keys, key


def test_the_commands_that_run_elsewhere_are_printed() -> None:
    assert {command for _, command in COMMANDS} >= ELSEWHERE
    flags = shlex.split(ORIGINAL)[2:]
    original = parse(TrainCommand, flags, "x", TrainCommand(default_for([])))
    assert original.config.max_iters == 1000
    for name in HUB_DATASETS:
        assert f"`{name}`" in (GUIDE / "data.md").read_text(encoding="utf-8")


def test_the_guide_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    listed = capsys.readouterr().out.partition("examples:")[0]
    verbs = re.findall(r"^  (?:experiment )?([a-z]+) ", listed, re.MULTILINE)
    text = (GUIDE / "command-line.md").read_text(encoding="utf-8")
    assert len(verbs) > 10
    for verb in verbs:
        assert f"`{verb}`" in text or f"`experiment {verb}`" in text, verb


def test_every_source_file_is_on_the_map() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for path in (ROOT / "src/storylab").rglob("*.py"):
        # A verb's file has the name of the verb.
        if not path.name.startswith("__") and path.parent.name != "verbs":
            assert f"`{path.name}`" in text, path
