"""Observers of a run: they see everything and change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from storylab.config import TrainConfig
from storylab.errors import Diverged
from storylab.record import checkpoint
from storylab.record.folder import RunFolder
from storylab.record.schema import Row, Summary
from storylab.training.observers import Observer
from storylab.training.train import train

MakeConfig = Callable[..., TrainConfig]
CLOCKS = {"tokens_per_second", "step_seconds", "data_seconds", "peak_memory_bytes"}


class Everything(Observer):
    """Keeps all that it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def start(self, folder: Path) -> None:
        self.seen.append(("start", folder))

    def row(self, row: Row) -> None:
        self.seen.append(("row", row))

    def line(self, text: str) -> None:
        self.seen.append(("line", text))

    def progress(self, name: str, done: int, total: int) -> None:
        self.seen.append(("progress", (name, done, total)))

    def end(self, summary: Summary | None) -> None:
        self.seen.append(("end", summary))

    def all(self, kind: str) -> list[Any]:
        return [value for name, value in self.seen if name == kind]


class Failing(Observer):
    """Fails in one of its methods, always."""

    def __init__(self, method: str) -> None:
        setattr(self, method, self.fail)

    def fail(self, *_: Any) -> None:
        raise ConnectionError("the server\nis away")


def result(run: RunFolder) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
    """Weights and optimizer state, rows without their clocks, and the validation of a run."""
    tensors, _ = checkpoint.load(run.checkpoint("last"))
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]
    summary = json.loads((run.folder / "summary.json").read_text())
    digests = {"sha256": checkpoint.weights_sha256(tensors)}
    return digests, kept, (summary["validation"], summary["samples"])


@pytest.mark.slow
def test_a_run_with_all_observers_equals_one_with_none(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    methods = ("start", "row", "line", "progress", "end")
    alone = train(tiny_config(out_dir=tmp_path / "alone"))
    watched = train(
        tiny_config(out_dir=tmp_path / "watched"),
        *(Failing(method) for method in methods),
        Everything(),
    )
    assert result(watched) == result(alone)


@pytest.mark.slow
def test_observers_see_what_the_run_folder_keeps(tiny_config: MakeConfig) -> None:
    observer = Everything()
    run = train(tiny_config(), observer)
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert msgspec.to_builtins(observer.all("row")) == rows
    assert {row["kind"] for row in rows} == {"iteration", "evaluation"}
    assert "\n".join(observer.all("line")) + "\n" == (run.folder / "log.txt").read_text()
    summary = json.loads((run.folder / "summary.json").read_text())
    assert msgspec.to_builtins(observer.all("end")) == [summary]
    assert [kind for kind, _ in observer.seen].index("start") == 0
    assert ("training", 9, 9) in observer.all("progress")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["start", "row", "line", "progress", "end"])
def test_a_failing_observer_is_dropped_with_one_line(tiny_config: MakeConfig, method: str) -> None:
    observer = Everything()
    run = train(tiny_config(max_iters=2), Failing(method), observer)
    dropped = [line for line in observer.all("line") if "Failing" in line]
    assert dropped == ["Failing failed and no longer watches: the server is away"]
    assert dropped[0] in (run.folder / "log.txt").read_text().splitlines()


def test_observers_see_the_end_of_a_run_that_diverges(tiny_config: MakeConfig) -> None:
    observer = Everything()
    with pytest.raises(Diverged):
        train(tiny_config(learning_rate=1e30, grad_clip=0.0, warmup_iters=0), observer)
    (summary,) = observer.all("end")
    assert summary.status == "diverged"
