"""Confirming: seeds of its own, fixed by the first call, on a test split whose openings are counted."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import experiment_folder
from executors import InProcess, Unused
from samples import TWO_RATES
from storylab.data.dataset import Dataset
from storylab.data.prepare import PrepareConfig, prepare
from storylab.experiments.confirm import fresh_seeds, note_opening
from storylab.experiments.openings import OpeningLog
from storylab.experiments.outcome import load_outcome
from storylab.experiments.records import FolderCache
from storylab.experiments.selection import (
    Selection,
    expected_largest,
    selection_line,
    selection_on,
    used_seeds,
)
from storylab.record.experiment_schema import ExperimentRecord

ARMS = TWO_RATES.replace("high = {", "more = { learning_rate = 3e-2 }\nhigh = {")


class Bench(experiment_folder.Bench):
    """Confirms an experiment of three arms."""

    def __call__(
        self, verb: str, *flags: str, name: str = "rates", executor: InProcess | None = None
    ) -> tuple[int, str]:
        """Returns the exit code and all output."""
        if not (self.root / f"{name}.toml").exists():
            self.write(ARMS, name)
        code, out, err = self.call(verb, *flags, name=name, executor=executor)
        return code, out + err

    def record(self, name: str = "rates-confirm") -> ExperimentRecord:
        return self.read_record(name)


@pytest.fixture
def bench(tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, dataset, capsys)


@pytest.mark.slow
def test_an_arm_is_confirmed_on_seeds_of_its_own(bench: Bench) -> None:
    assert bench("run")[0] == 0
    code, out = bench("confirm", "--only", "high")
    assert code == 0
    # Seeds 1 and 2 were searched; 3 is planned for the search's last look.
    assert "Seeds for the confirmation alone: 4, 5, 6, 7, 8" in out
    assert (
        "Chosen among 2 arms on 2 seeds: the best of as many equal arms would look better by" in out
    )
    assert "This plan: registered before any run" in out
    assert "The test split of this data was not opened before" in out
    record = bench.record()
    assert (record.stage, record.variance, record.looks) == ("confirm", "own", [5])
    assert record.arms == ["low", "high"] and record.seeds == [4, 5, 6, 7, 8]
    assert record.registered is not None and record.registered.plan["stage"] == "confirm"
    assert [opening.seeds for opening in record.openings] == [5]
    assert bench.record("rates").openings == []


@pytest.mark.slow
def test_the_same_command_goes_on_and_counts_every_opening(bench: Bench) -> None:
    assert bench("confirm", "--only", "high")[0] == 0
    seeds = bench.record().seeds
    code, out = bench("confirm", executor=Unused())  # the arms are known by now
    assert code == 0 and bench.record().seeds == seeds
    assert "The test split of this data was opened once before" in out
    assert bench("confirm", "--only", "high", executor=Unused())[0] == 0
    assert len(bench.record().openings) == 3 and bench.record().amendments == []

    # Another experiment on the same data takes other seeds, and the count goes on.
    (bench.root / "other.toml").write_text(ARMS)
    code, out = bench("confirm", "--only", "more", name="other")
    assert "opened 3 times before" in out
    assert not set(bench.record("other-confirm").seeds) & set(seeds)


@pytest.mark.slow
def test_an_opening_that_another_process_notes_is_not_lost(bench: Bench) -> None:
    """Neither from the record nor from the log, which counts openings where a record was deleted."""
    assert bench("run")[0] == 0
    path, data = bench.runs / "experiments" / "rates.json", bench.dataset.fingerprint
    ours, theirs = FolderCache(), FolderCache()
    assert ours.record(path).openings == theirs.record(path).openings == []
    assert note_opening(path, 5, data, theirs) == 0
    assert note_opening(path, 6, data, ours) == 1
    assert [opening.seeds for opening in bench.record("rates").openings] == [5, 6]
    log = (path.parent / "test-openings.jsonl").read_text().splitlines()
    assert [json.loads(line)["seeds"] for line in log] == [5, 6]
    path.unlink()
    assert OpeningLog.read(path.parent).count(data) == 2
    assert OpeningLog.read(path.parent).count("other") == 0


@pytest.mark.slow
def test_more_seeds_after_an_opening_are_an_amendment(bench: Bench) -> None:
    assert bench("confirm", "--only", "high")[0] == 0
    code, out = bench("confirm", "--seeds", "6")
    assert code == 0 and "looks 5 -> 6 after 10 of 12 runs: exploratory" in out
    assert bench.record().seeds == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "say which arms to confirm: --only ARM, one or more of more, high"),
        (("--only", "low"), "say which arms to confirm"),
        (("--only", "none"), "there is no arm none"),
        (("--only", "high", "--seeds", "4"), "seeds is 4: it must be 5 to 10,000"),
    ],
)
def test_what_cannot_be_confirmed_is_said(bench: Bench, flags: tuple[str, ...], words: str) -> None:
    code, out = bench("confirm", *flags, executor=Unused())
    assert code == 2 and words in out and "Traceback" not in out
    assert not bench.runs.exists()


def test_data_without_a_test_split_says_how_to_get_one(
    bench: Bench, dataset: Dataset, tmp_path: Path
) -> None:
    few = PrepareConfig(
        source="builtin", tokenizer="bpe:300", out=tmp_path / "few", builtin_stories=20
    )
    bench.dataset = prepare(few)
    if bench.dataset.has_test:
        pytest.skip("20 stories are enough for a test split")
    code, out = bench("confirm", "--only", "high", executor=Unused())
    assert code == 2 and "has no test split to confirm on" in out and "--test" in out


@pytest.mark.slow
def test_a_damaged_record_is_not_begun_again(bench: Bench) -> None:
    assert bench("confirm", "--only", "high")[0] == 0
    path = bench.runs / "experiments" / "rates-confirm.json"
    path.write_text("{")
    code, out = bench("confirm", "--only", "high", executor=Unused())
    assert code == 2 and "rates-confirm.json" in out and path.read_text() == "{"


@pytest.mark.slow
def test_seeds_of_all_runs_on_the_data_are_used(bench: Bench) -> None:
    """Those of noise runs, of runs that were set aside and of damaged ones too; not those on other data."""
    assert bench("run")[0] == 0
    cache, data = FolderCache(), bench.dataset.fingerprint
    assert used_seeds(bench.runs, data, cache) == {1, 2, 3}
    run = next(bench.runs.glob("nano-*-s1"))
    other = json.loads((run / "data.json").read_text()) | {"fingerprint": "other"}
    config = json.loads((run / "config.json").read_text())
    for name, seed, values in (("a", 40, None), ("b", 41, other), ("c-s42.old1", 42, "{")):
        folder = bench.runs / name
        folder.mkdir()
        text = json.dumps(config | {"seed": seed, "data_seed": seed})
        (folder / "config.json").write_text(text if values != "{" else "{")
        (folder / "data.json").write_text(json.dumps(values or (other | {"fingerprint": data})))
    assert used_seeds(bench.runs, data, FolderCache()) == {1, 2, 3, 40, 42}


def test_fresh_seeds_count_up_and_leave_used_ones_out() -> None:
    assert fresh_seeds({4, 6}, 3, 4) == (3, 5, 7, 8)


@pytest.mark.parametrize("count", [2, 6, 25, 1000])
def test_the_best_of_equal_arms_by_simulation(count: int) -> None:
    """Arms against one baseline, over three seeds: the best looks better by what is said."""
    rng = np.random.default_rng(count)
    arms = rng.normal(0, 0.01, (2000, count)) / math.sqrt(3)
    baseline = rng.normal(0, 0.01, 2000) / math.sqrt(3)
    gain = float(-(arms.min(1) - baseline).mean())
    said = Selection(count, 3).best_by_chance(0.01 * math.sqrt(2))
    assert said == pytest.approx(gain, abs=0.0005)


def test_the_expected_largest_of_normals() -> None:
    assert expected_largest(1) == 0.0
    assert expected_largest(2) == pytest.approx(1 / math.sqrt(math.pi))
    assert expected_largest(3) == pytest.approx(1.5 / math.sqrt(math.pi))
    assert expected_largest(12) == pytest.approx(1.62923, abs=1e-4)  # tables of order statistics


@pytest.mark.slow
def test_arms_are_counted_once_over_all_searches(bench: Bench) -> None:
    assert bench("run")[0] == 0
    (bench.root / "again.toml").write_text(
        ARMS.replace("high = {", "new = { learning_rate = 2e-2 }\nhigh = {")
    )
    assert bench("run", name="again")[0] == 0
    assert bench("confirm", "--only", "high")[0] == 0
    found = selection_on(bench.runs, bench.dataset.fingerprint, FolderCache())
    assert found == Selection(arms=3, seeds=2)
    assert selection_on(bench.runs, "other", FolderCache()) == Selection(0, 0)
    assert selection_line(found, None) == "Chosen among 3 arms on 2 seeds"
    assert selection_line(found, 0.01).endswith("would look better by 0.0042 nats")


@pytest.mark.slow
def test_a_deleted_record_does_not_make_the_test_split_new(bench: Bench) -> None:
    bench("run")
    bench("confirm", "--only", "high")
    (bench.runs / "experiments" / "rates-confirm.json").unlink()
    _, out = bench("confirm", "--only", "high")
    assert "The test split of this data was opened once before" in out


@pytest.mark.slow
def test_the_test_split_stays_closed_before_all_runs_have_ended(bench: Bench) -> None:
    bench("run")
    bench("confirm", "--only", "high")
    path = bench.runs / "experiments" / "rates-confirm.json"
    shown = load_outcome(path)
    losses = {run.loss for run in shown.runs}
    assert losses == {run.results.test.loss for run in shown.runs if run.results.test}
    shutil.rmtree(shown.runs[0].folder)
    closed = load_outcome(path)
    assert closed.runs == [] and any("stays closed" in problem for problem in closed.problems)


@pytest.mark.slow
def test_runs_that_began_before_the_registration_are_named(bench: Bench) -> None:
    """They were moved away while the plan was registered, and back."""
    bench("run")
    path = bench.runs / "experiments" / "rates.json"
    record = json.loads(path.read_text())
    record["registered"]["time"] = "2999-01-01T00:00:00+0000"
    path.write_text(json.dumps(record))
    (c, *_) = load_outcome(path).comparisons
    assert any("began before the plan was registered" in reason for reason in c.exploratory)
