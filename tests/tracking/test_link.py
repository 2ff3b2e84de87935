"""A tracker that fails, hangs or is killed neither stops, slows nor changes a run."""

from __future__ import annotations

import io
import json
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from samples import MakeConfig
from storylab.errors import Interrupted, UserError
from storylab.record import checkpoint
from storylab.record.folder import RunFolder
from storylab.record.schema import EvaluationRow, IterationRow, Summary
from storylab.tracking import TrackerEntry
from storylab.tracking.link import TrackerLink
from storylab.tracking.observer import TrackerObserver, trackers
from storylab.tracking.points import EVALUATION_NAMES, ITERATION_NAMES
from storylab.tracking.protocol import Place, Rows, TrackedRun
from storylab.tracking.run import tracked_run
from storylab.tracking.worker import serve
from storylab.training.observers import Observer
from storylab.training.resume import resume
from storylab.training.train import train


def observer(kind: str, **options: Any) -> TrackerObserver:
    entry = TrackerEntry(f"stand_in_trackers:{kind}")
    return TrackerObserver("stand-in", entry=entry, **options)


def kept(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder.parent / "kept.jsonl").read_text().splitlines()]


def remarks(run: RunFolder) -> list[str]:
    lines = (run.folder / "log.txt").read_text().splitlines()
    return [line for line in lines if line.startswith("tracker ")]


def bits(run: RunFolder) -> tuple[str, list[tuple[Any, Any]]]:
    tensors, _ = checkpoint.load(run.checkpoint("last"))
    rows = [(row.iteration, getattr(row, "loss", None)) for row in run.read_rows()]
    return checkpoint.weights_sha256(tensors), rows


@pytest.fixture(scope="module")
def some_run() -> TrackedRun:
    return TrackedRun(
        id="0" * 32,
        place=Place("a"),
        folder="/nowhere/a",
        started=0.0,
        config={},
        history="",
        history_bytes=0,
    )


def row(iteration: int) -> EvaluationRow:
    return EvaluationRow(iteration=iteration, train_loss=1.0, val_loss=1.0, best=False)


@pytest.mark.slow
def test_a_tracker_gets_every_row_and_the_results(tiny_config: MakeConfig) -> None:
    watching = observer("Keeping")
    run = train(tiny_config(), watching)
    assert remarks(run) == []
    (config, *points, end) = kept(run.folder)
    assert config[1]["learning_rate"] == 1e-2 and config[1]["n_layer"] == 2
    assert not {"out_dir", "data_dir"} & set(config[1])
    seconds, expected = 0.0, []
    for values in map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines()):
        names = ITERATION_NAMES if values["kind"] == "iteration" else EVALUATION_NAMES
        values["utilization_percent"] = values.pop("utilisation_percent", None)
        seconds += values.get("step_seconds", 0.0)
        numbers = {n: float(values[f]) for f, n in names.items() if values[f] is not None}
        expected.append(["point", [values["iteration"], seconds, numbers]])
    assert points == expected
    summary = json.loads((run.folder / "summary.json").read_text())
    status, step, values, notes = end[1]
    assert (status, step) == ("finished", 9)
    assert values["final/validation/loss"] == summary["validation"]["loss"]
    assert notes["final/memory_kind"] == "resident"
    assert watching.place == str(run.folder.parent / "kept.jsonl")


@pytest.mark.slow
def test_the_test_split_stays_closed(tiny_config: MakeConfig) -> None:
    run = train(tiny_config(), observer("Keeping"))
    summary = json.loads((run.folder / "summary.json").read_text())
    text = (run.folder.parent / "kept.jsonl").read_text()
    assert summary["test"]["loss"] > 0
    assert repr(summary["test"]["loss"]) not in text and "final/test" not in text


def test_every_field_of_a_row_has_a_name() -> None:
    assert {"iteration", *ITERATION_NAMES} == set(IterationRow.__struct_fields__)
    assert {"iteration", *EVALUATION_NAMES} == set(EvaluationRow.__struct_fields__)
    page = (Path(__file__).parents[2] / "docs/guide/trackers.md").read_text(encoding="utf-8")
    for name in (*ITERATION_NAMES.values(), *EVALUATION_NAMES.values()):
        assert f"`{name}`" in page


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.parametrize("kind", ["HangsAtStart", "HangsAtLog", "HangsAtEnd", "Killed", "Fails"])
def test_a_broken_tracker_changes_nothing_and_is_named_once(
    kind: str, tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_API_KEY", "sesame-open")
    alone = train(tiny_config(out_dir=tmp_path / "alone"))
    watching, waited = observer(kind, end_seconds=8), []
    end = watching.end

    def timed(summary: Summary | None) -> None:
        began = time.monotonic()
        try:
            end(summary)
        finally:
            waited.append(time.monotonic() - began)

    monkeypatch.setattr(watching, "end", timed)
    watched = train(tiny_config(out_dir=tmp_path / "watched"), watching)
    assert bits(watched) == bits(alone)
    (remark,) = remarks(watched)
    assert remark.endswith(f"storylab sync {watched.folder} --to stand-in")
    reason = {"Killed": "ended with -9", "Fails": "401 for key *** at https://***@host/api."}
    assert reason.get(kind, "was not done 8 s after the end") in remark
    assert all(seconds < 8 + 2 for seconds in waited)


@pytest.mark.slow
def test_rows_beyond_the_queue_are_dropped_counted_and_named_once(tiny_config: MakeConfig) -> None:
    run = train(tiny_config(), observer("Keeping", capacity=0))
    assert remarks(run) == [
        "tracker stand-in failed and no longer watches: it was slower than the run, and 11 of 11 rows were "
        f"not sent. Send the whole run later: storylab sync {run.folder} --to stand-in"
    ]
    assert [kind for kind, _ in kept(run.folder)] == ["config", "end"]


def test_a_full_queue_drops_and_does_not_wait(some_run: TrackedRun) -> None:
    link = TrackerLink("stand_in_trackers:HangsAtStart", some_run, capacity=10)
    began = time.monotonic()
    for iteration in range(100_000):
        link.put(row(iteration))
    seconds = time.monotonic() - began
    link.finish(None, 0.5)
    assert seconds < 20  # 200 microseconds a row, on a busy machine
    assert link.late
    # The pipe takes 64 KiB, which is under a thousand rows.
    assert 98_000 < link.dropped <= 100_000 - 10
    assert link.dropped + link.waiting + link.handed_over <= 100_000


def test_output_of_a_library_blocks_nothing(some_run: TrackedRun, tmp_path: Path) -> None:
    run = msgspec.structs.replace(some_run, folder=str(tmp_path / "a"))
    link = TrackerLink("stand_in_trackers:Prints", run)
    link.put(row(1))
    link.finish(None, 60)
    assert not link.late and link.answer is not None and not link.answer.failed
    assert [kind for kind, _ in kept(tmp_path / "a")] == ["config", "point", "end"]


def test_a_tracker_ends_when_the_process_of_the_run_is_gone(
    some_run: TrackedRun, tmp_path: Path
) -> None:
    run = msgspec.structs.replace(some_run, folder=str(tmp_path / "a"))
    messages = [run, Rows([row(1)])]
    pipe = io.BytesIO(b"".join(msgspec.json.encode(message) + b"\n" for message in messages))
    answer = serve("stand_in_trackers:Keeping", pipe)
    assert answer.place == str(tmp_path / "kept.jsonl") and not answer.failed
    assert kept(tmp_path / "a")[1:] == [
        ["point", [1, 0.0, {n: float(n != "evaluation/best") for n in EVALUATION_NAMES.values()}]],
        ["end", None],
    ]


class StopAfter(Observer):
    """Sends the run's process a signal at an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def row(self, row: object) -> None:
        if isinstance(row, IterationRow) and row.iteration == self.iteration:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.posix
def test_a_resumed_run_is_the_same_run_with_every_row_once(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    with pytest.raises(Interrupted):
        train(config, StopAfter(5), observer("Keeping", stop_seconds=60))
    assert config.out_dir is not None
    before = kept(config.out_dir)
    first = tracked_run(config.out_dir, Place("a"))
    assert before[-1] == ["end", None]
    run = resume(config.out_dir, None, observer("Keeping"))
    assert tracked_run(config.out_dir, Place("a")).id == first.id
    steps = [[p[1][0], sorted(p[1][2])[0]] for p in kept(run.folder) if p[0] == "point"]
    assert len({tuple(step) for step in steps}) == len(steps)
    assert [step for step, name in steps if name.startswith("memory")] == list(range(9))


@pytest.mark.slow
def test_the_id_is_of_the_run_and_not_of_its_folder(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    run = train(tiny_config(max_iters=2))
    first = tracked_run(run.folder, Place("a")).id
    run.folder.rename(tmp_path / "moved")
    assert tracked_run(tmp_path / "moved", Place("b", "c", "d")).id == first
    other = train(tiny_config(max_iters=2, learning_rate=2e-2, out_dir=tmp_path / "other"))
    assert tracked_run(other.folder, Place("a")).id != first


@pytest.mark.slow
def test_an_error_of_the_run_ends_the_process(tiny_config: MakeConfig) -> None:
    with pytest.raises(UserError), trackers([]) as none:
        assert none == []
        raise UserError("the disk is full")
    watching = observer("HangsAtStart", stop_seconds=0.2)
    run = train(tiny_config(max_iters=2))
    watching.start(run.folder)
    link = watching._link
    assert link is not None
    watching.close()
    assert link._process.poll() is not None
