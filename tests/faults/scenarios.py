"""The commands that are made to fail, and the results that must not change by it.

A scenario has a folder to start from, the command that comes first and after every failure, and a result:
everything in its folder that the clock does not decide.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from fork_server import Ended, Fault, ForkServer

from finished_runs import found, metrics, weights
from samples import TWO_RATES
from storylab.record.folder import RunFolder

SHAPE = (
    "--preset nano --n_layer 1 --n_head 1 --n_kv_head 1 --n_embd 16 --n_hidden 16 --dtype float32"
)
LENGTH = (
    "--max_iters 11 --batch_size 4 --gradient_accumulation_steps 2 --block_size 16 --learning_rate 1e-2 "
    "--warmup_iters 2 --eval_interval 4 --eval_iters 1 --log_interval 2 --checkpoint_minutes 0"
)
TRAIN = f"train {SHAPE} {LENGTH} --device cpu --data_dir data --out_dir run".split()
PREPARE = "prepare --source builtin --tokenizer bpe:300 --builtin_stories 120 --out data".split()
EXPERIMENT = "experiment run two-rates.toml --data_dir data --runs runs".split()
REPORT = "experiment report --runs runs --out report".split()
EXPORT = "export run --format hf --out exported".split()
EVALUATE = "eval run".split()

Result = Callable[[Path], Any]
Next = Callable[[Path], list[str]]


@dataclass(frozen=True)
class Scenario:
    """A command to make fail.

    Attributes:
        phase: name of the work that it does.
        start: the folder to begin with, which is copied.
        command: first or next command, by the folder.
        result: what must not change, of a folder where the command has ended.
        chosen: whether to fail at a change, ``KIND PATH``, of the command.
    """

    phase: str
    start: Path
    command: Next
    result: Result
    chosen: Callable[[str], bool] = lambda change: True

    def begin(self, place: Path) -> Path:
        """A fresh copy of the folder to begin with."""
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.start, place, symlinks=True)
        return place

    def run(self, server: ForkServer, place: Path, fault: Fault | None = None) -> Ended:
        """Run the command that is next, with a fault."""
        return server.run(place, self.command(place), fault)

    def finish(self, server: ForkServer, place: Path) -> Any:
        """Run the next command, which must succeed; returns the result."""
        ended = self.run(server, place)
        assert ended.code == 0, f"{self.phase}: {ended.code}\n{ended.output}"
        return self.result(place)

    def points(self, ended: Ended) -> list[int]:
        """The numbers of the changes at which this scenario fails."""
        return [n for n, change in enumerate(ended.changes, start=1) if self.chosen(change)]


def make_scenarios(server: ForkServer, root: Path) -> dict[str, Scenario]:
    """Every scenario by its phase; makes a data set, a run and an experiment in ``root`` to start from."""
    empty, data, trained = root / "empty", root / "with-data", root / "trained"
    compared = root / "compared"
    empty.mkdir()
    _must(server, _copy(empty, data), PREPARE)
    (data / "two-rates.toml").write_text(TWO_RATES)
    _must(server, _copy(data, trained), TRAIN)
    _must(server, _copy(data, compared), EXPERIMENT)
    shutil.rmtree(compared / "runs" / "report", ignore_errors=True)
    train = Scenario("training", data, _train_or_resume, _run_result)
    return {
        scenario.phase: scenario
        for scenario in (
            Scenario("preparation", empty, lambda place: PREPARE, _all_bytes("data")),
            train,
            Scenario("checkpointing", data, train.command, train.result, _of_a_checkpoint),
            Scenario("evaluation", data, train.command, train.result, _of_an_evaluation),
            Scenario("scheduling", data, lambda place: EXPERIMENT, _experiment_result),
            Scenario("reporting", compared, lambda place: REPORT, _all_bytes("report")),
            Scenario("export", trained, lambda place: EXPORT, _all_bytes("exported")),
        )
    }


def _copy(start: Path, place: Path) -> Path:
    shutil.copytree(start, place)
    return place


def _must(server: ForkServer, place: Path, words: Sequence[str]) -> None:
    ended = server.run(place, list(words))
    assert ended.code == 0, ended.output


def _train_or_resume(place: Path) -> list[str]:
    """The message of ``train`` says so: a folder with a config is a run to resume."""
    return ["resume", "run"] if (place / "run" / "config.json").exists() else TRAIN


def _of_a_checkpoint(change: str) -> bool:
    return "checkpoints/" in change


def _of_an_evaluation(change: str) -> bool:
    """The evaluations along the run save the best weights; the last one writes losses of stories."""
    return any(name in change for name in ("best.safetensors", "losses.npy"))


def _run_result(place: Path) -> Any:
    return run_result(RunFolder(place / "run"))


def run_result(run: RunFolder) -> Any:
    """Weights, rows and losses of a run that has ended."""
    summary = found(run)
    losses = {path.name: _sha256(path) for path in sorted(run.folder.glob("*_losses.npy"))}
    return (
        weights(run),
        metrics(run),
        losses,
        msgspec.to_builtins([summary.validation, summary.best_val_loss, summary.samples]),
    )


def _experiment_result(place: Path) -> Any:
    """Every run, and the verdicts of the comparison."""
    folders = sorted((place / "runs").glob("nano-*"))
    (record,) = (place / "runs" / "experiments").glob("*.json")
    registered = {
        key: value
        for key, value in json.loads(record.read_text()).items()
        if key in ("arms", "seeds")
    }
    log = (place / "runs" / "report" / "EXPERIMENTS.md").read_text()
    verdicts = [line for line in log.splitlines() if line.startswith("**") or "95 % CI" in line]
    return {folder.name: run_result(RunFolder(folder)) for folder in folders}, registered, verdicts


def _all_bytes(folder: str) -> Result:
    def result(place: Path) -> Any:
        files = [path for path in sorted((place / folder).rglob("*")) if path.is_file()]
        return {str(path.relative_to(place)): _sha256(path) for path in files}

    return result


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
