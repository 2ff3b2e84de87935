"""An experiment is trained look by look, and an arm that a look has settled stops there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import experiment_folder
from damage import change
from executors import InProcess, Unused
from samples import TWO_RATES
from storylab.cli import main
from storylab.data.dataset import Dataset
from storylab.experiments.records import FolderCache
from storylab.experiments.stopping import note_look, stops, unplanned_line
from storylab.record.experiment_schema import ExperimentRecord

# Near arms, which stay undecided.
NEAR = TWO_RATES.replace("margin = 0.02\n", "").replace("rate = 1e-2", "rate = 2e-3")
WIDE = TWO_RATES.replace(
    "margin = 0.02", "margin = 5.0"
)  # everything is equivalent at the first look


class Bench(experiment_folder.Bench):
    """Trains look by look."""

    def run(self, text: str, *flags: str, executor: InProcess | None = None) -> tuple[int, str]:
        """Returns the number of runs trained and the output."""
        self.write(text)
        executor = executor or InProcess()
        code, out, err = self.call("run", *flags, executor=executor)
        assert code == 0, out + err
        return executor.actions.count("train"), out

    @property
    def record(self) -> ExperimentRecord:
        return self.read_record()

    def looks(self) -> list[tuple[int, list[str]]]:
        return [(look.seeds, look.settled) for look in self.record.looks_taken]


@pytest.fixture
def bench(tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, dataset, capsys)


def test_training_pauses_at_every_planned_look() -> None:
    assert stops((3, 5, 8), 8) == [3, 5, 8]
    assert stops((3, 5, 8), 3) == [3]
    assert stops((3, 5, 8), 2) == [2]
    assert stops((3, 5, 8), 4) == [3, 4]
    assert stops((3, 5, 8), 10) == [3, 5, 8, 10]


def test_a_number_of_seeds_that_is_no_look_is_said() -> None:
    assert unplanned_line((3, 5), 5) is None
    assert "first planned look is at 3" in (unplanned_line((3, 5), 2) or "")
    assert "those of the look at 3 seeds" in (unplanned_line((3, 5), 4) or "")
    assert "those of the look at 5 seeds" in (unplanned_line((3, 5), 9) or "")


@pytest.mark.slow
def test_a_settled_arm_is_not_trained_with_more_seeds(bench: Bench) -> None:
    trained, out = bench.run(WIDE, "--seeds", "3")
    assert trained == 4  # two seeds of both arms: the baseline has nothing to wait for either
    assert "Look at 2 seeds:" in out and "Settled, so not trained with more seeds: high" in out
    assert bench.looks() == [(2, ["high"])]
    assert [sorted(cell.runs) for cell in bench.record.cells] == [["1", "2"], ["1", "2"]]

    trained, out = bench.run(WIDE, "--seeds", "3", executor=Unused())
    assert "Look at" not in out  # nothing new was to be seen
    assert bench.looks() == [(2, ["high"])]


@pytest.mark.slow
def test_an_undecided_arm_goes_on_to_the_last_look(bench: Bench) -> None:
    trained, out = bench.run(NEAR, "--seeds", "3")
    assert trained == 6 and "This plan: registered before any run" in out
    assert [seeds for seeds, _ in bench.looks()] == [2, 3]
    assert bench.looks()[0][1] == []
    trained, _ = bench.run(NEAR, "--seeds", "3", executor=Unused())
    assert trained == 0 and len(bench.looks()) == 2


@pytest.mark.slow
def test_one_arm_goes_on_where_another_is_settled(bench: Bench) -> None:
    """The open arm's baseline goes on with it."""
    text = TWO_RATES.replace("margin = 0.02", "margin = 0.004").replace(
        "high = {", "same = { learning_rate = 1.0001e-3 }\nhigh = {"
    )
    trained, _ = bench.run(text, "--seeds", "3")
    (first, settled), *_ = bench.looks()
    assert first == 2 and settled == ["same"]
    assert trained == 3 * 2 + 2
    runs = {cell.arm: sorted(cell.runs) for cell in bench.record.cells}
    assert runs == {"low": ["1", "2", "3"], "same": ["1", "2"], "high": ["1", "2", "3"]}


@pytest.mark.slow
def test_an_unplanned_number_of_seeds_is_trained_and_said(bench: Bench) -> None:
    trained, out = bench.run(NEAR.replace("looks = [2, 3]", "looks = [2, 5]"), "--seeds", "3")
    assert trained == 6 and "verdicts stay those of the look at 2 seeds" in out
    assert [seeds for seeds, _ in bench.looks()] == [2]


@pytest.mark.slow
def test_fewer_seeds_than_the_first_look_take_no_look(bench: Bench) -> None:
    trained, out = bench.run(TWO_RATES, "--seeds", "1")
    assert trained == 2 and "the first planned look is at 2" in out
    assert bench.looks() == []


@pytest.mark.slow
def test_a_look_that_another_process_notes_is_not_lost(bench: Bench) -> None:
    """Each process keeps the record that it has read, and writes over the one that is there by then."""
    bench.run(TWO_RATES, "--seeds", "1")
    path = bench.root / "runs" / "experiments" / "rates.json"
    ours, theirs = FolderCache(), FolderCache()
    assert ours.record(path).looks_taken == theirs.record(path).looks_taken == []
    note_look(path, theirs, 2, {("", "high")}, again=False)
    note_look(path, ours, 3, set(), again=False)
    assert bench.looks() == [(2, ["high"]), (3, [])]
    note_look(path, theirs, 3, set(), again=False)  # it sees that the look has been noted
    assert [look.seeds for look in theirs.record(path).looks_taken] == [2, 3]
    assert len(bench.looks()) == 2

    # A key of a later version stays, whoever writes it and whenever.
    change(path, later=1)
    note_look(path, ours, 5, set(), again=False)
    assert [seeds for seeds, _ in bench.looks()] == [2, 3, 5]
    assert json.loads(path.read_text())["later"] == 1


@pytest.mark.slow
def test_measuring_noise_takes_no_look(bench: Bench) -> None:
    (bench.root / "rates.toml").write_text(TWO_RATES)
    args = ["--runs", str(bench.root / "runs"), "--data_dir", str(bench.dataset.folder)]
    file = str(bench.root / "rates.toml")
    assert main(["noise", file, *args, "--seeds", "3"], executor=InProcess()) == 0
    assert bench.looks() == []
    assert bench.record.registered is not None and bench.record.registered.runs_finished == 0
