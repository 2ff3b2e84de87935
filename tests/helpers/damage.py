"""An experiment with finished runs to damage, and the commands that read it, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from executors import InProcess, perform_quietly
from record_folders import forget_checksums
from storylab.cli import main
from storylab.execution.job import Job, Outcome

FILES = [
    *("config.json", "data.json", "environment.json", "summary.json", "precision.json"),
    *("metrics.jsonl", "story_losses.npy", "position_losses.npy", "test_losses.npy"),
    "tokenizer.tiktoken",
    *("checkpoints/last.safetensors", "log.txt"),
]
# Those that every comparison and report reads; the others are for going on and for sampling.
RECORD = FILES[:9]


def change(path: Path, **values: Any) -> None:
    """Replace keys of a JSON file, as if its folder had no checksums."""
    forget_checksums(path.parent)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class Place:
    """An experiment with its runs and data, to damage."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file, self.runs, self.data = root / "rates.toml", root / "runs", root / "data"
        self.record = self.runs / "experiments" / "rates.json"

    @property
    def folders(self) -> list[Path]:
        """The runs: low and high of seed 1, low and high of seed 2."""
        cells = json.loads((self.root / "rates.json").read_text())["cells"]
        return [self.runs / cell["runs"][seed] for seed in "12" for cell in cells]

    def copy(self, to: Path) -> Place:
        if to.exists():
            shutil.rmtree(to)
        shutil.copytree(self.root, to)
        return Place(to)

    def verbs(self) -> list[list[str]]:
        """Every verb that reads a record, on the first run where it takes one."""
        run, *others = map(str, self.folders)
        data = ["--data_dir", str(self.data)]
        runs = ["--runs", str(self.runs)]
        return [
            ["list", *runs],
            ["watch", *runs],
            ["compare", *others, run],
            ["compare", run, *others],
            ["noise", run],
            ["noise", others[1]],
            ["sample", run, "--max_new_tokens", "3", "--device", "cpu"],
            ["eval", run, "--device", "cpu", *data],
            ["experiment", "report", *runs],
            ["resume", run, *data],
            ["experiment", "run", str(self.file), *runs, *data],
        ]


@contextlib.contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Fail where something waits for ever; far more time than the block needs."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def only_train(job: Job) -> Outcome:
    """Training in this process, and no calibrations."""
    return perform_quietly(job) if job.action == "train" else Outcome("done")


def run_command(capsys: pytest.CaptureFixture[str], args: list[str]) -> tuple[int, str]:
    """Exit code and everything printed; standard error has at most one line that is the program's own."""
    with no_longer_than(900):
        code = main(args, InProcess(only_train))
    out, err = capsys.readouterr()
    assert code in (0, 1, 2), args
    assert err.count("storylab: ") <= 1 and "Traceback" not in out + err
    assert code != 2 or err.startswith("storylab: ")
    if args[:2] == ["experiment", "report"] and code == 0:
        out += (Path(args[3]) / "report" / "EXPERIMENTS.md").read_text()
    return code, out + err


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def make_folder(path: Path) -> None:
    path.mkdir()


def make_nonsense(path: Path) -> None:
    path.write_bytes(b"\xff{[")


KINDS = [make_fifo, make_loop, make_dangling, make_folder, make_nonsense]
