"""The record of a run: typed, read once, the same for listings as for the whole run."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import storylab
from conftest import SMALL_EXPERIMENT
from executors import Unused, train_here
from storylab.cli import main
from storylab.config import TrainConfig, to_dict
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.experiments.compare import compare_arms
from storylab.experiments.comparison import Arm
from storylab.experiments.plan import plan_runs
from storylab.experiments.spec import load_experiment
from storylab.record import provenance
from storylab.record.folder import RunFolder
from storylab.record.index import RunCache, list_runs
from storylab.record.provenance import representative
from storylab.record.run import Run, load_run
from storylab.record.schema import EvaluationRow, IterationRow, QuantizationRow
from storylab.reporting import report as reporting


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the experiment's file, its data, and its finished runs of two seeds."""
    root = tmp_path_factory.mktemp("record")
    shutil.copytree(dataset.folder, root / "data")
    (root / "rates.toml").write_text(SMALL_EXPERIMENT.format(seeds="1, 2"))
    for run in plan_runs(load_experiment(root / "rates.toml"), dataset, root / "runs"):
        assert train_here(run.config).status == "done"
    return root


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(trained, tmp_path / "place")
    return tmp_path / "place"


def folders(place: Path) -> list[Path]:
    return sorted((place / "runs").glob("nano-*"))


class Opened:
    """Counts the files that this process opens, while it is switched on."""

    def __init__(self) -> None:
        self.on, self.paths = False, Counter[str]()
        sys.addaudithook(self._note)  # it cannot be removed again

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and event == "open" and isinstance(args[0], str):
            self.paths[args[0]] += 1

    @contextmanager
    def under(self, folder: Path) -> Iterator[Counter[str]]:
        """How often each file under ``folder`` has been opened, once the block has ended."""
        self.paths.clear()
        found: Counter[str] = Counter()
        self.on = True
        try:
            yield found
        finally:
            self.on = False
            for path, count in self.paths.items():
                if path.startswith(str(folder)) and Path(path).is_file():
                    found[path] = count


@pytest.fixture(scope="module")
def opened() -> Opened:
    return Opened()


@pytest.mark.parametrize("seeds", ["1, 2", "1"])
def test_a_finished_experiment_reads_no_file_twice(
    place: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch, seeds: str
) -> None:
    """With one seed, the noise of the other one in the folder is read too."""
    file = place / "rates.toml"
    file.write_text(SMALL_EXPERIMENT.format(seeds=seeds))
    monkeypatch.setattr(reporting, "_figures", lambda outcome: ())
    args = ["--runs", str(place / "runs"), "--data_dir", str(place / "data")]
    assert main(["experiment", "run", str(file), *args], Unused()) == 0
    with opened.under(place) as count:
        assert main(["experiment", "run", str(file), *args], Unused()) == 0
    run = folders(place)[0]
    for name in ("config.json", "summary.json", "metrics.jsonl", "story_losses.npy"):
        assert count[str(run / name)] == 1
    # Shards are hashed and then mapped; the experiment's record is read, written and read.
    expected = {".bin": 2, "experiments": 2}
    for path, times in count.items():
        kind = Path(path).suffix if Path(path).suffix == ".bin" else Path(path).parent.name
        assert times <= expected.get(kind, 1), path


def test_a_listing_reads_the_summary_alone(place: Path, opened: Opened) -> None:
    with opened.under(place) as count:
        entries = list(list_runs(place / "runs"))
    assert [Path(path).name for path in count] == ["summary.json"] * 4
    for entry, folder in zip(entries, folders(place), strict=True):
        run = load_run(folder)
        assert (entry.name, entry.state, entry.started) == (
            *(folder.name, "finished"),
            run.environment.started,
        )
        assert (entry.loss, entry.speed) == (run.loss, run.speed)
        assert (entry.parameters, entry.tokens) == (run.parameters, run.results.tokens)
        assert run.results.training_memory_bytes == run.training_memory


def test_summaries_of_an_earlier_version_are_listed_from_the_rows(place: Path) -> None:
    before = list(list_runs(place / "runs"))
    for folder in folders(place):
        path = folder / "summary.json"
        summary = json.loads(path.read_text())
        for name in ("started", "median_tokens_per_second", "training_memory_bytes"):
            del summary[name]
        path.write_text(json.dumps(summary))
    assert list(list_runs(place / "runs")) == before


def test_a_listing_looks_for_the_files_that_it_does_not_read(place: Path) -> None:
    first, second, *_ = folders(place)
    (first / "story_losses.npy").unlink()
    (second / "config.json").unlink()
    (second / "config.json").mkdir()
    found = {entry.name: entry for entry in list_runs(place / "runs")}
    assert found[first.name].state == found[second.name].state == "damaged"
    assert "story_losses.npy is missing" in found[first.name].fault
    assert "config.json: it is a folder" in found[second.name].fault


def test_a_cache_reads_again_only_after_a_change(place: Path, opened: Opened) -> None:
    folder, cache = folders(place)[0], RunCache()
    assert cache.state(folder) == ("finished", "")
    run = cache.load(folder)
    with opened.under(place) as count:
        assert cache.load(folder) is run and cache.head(folder).config == run.config
        assert cache.state(folder) == ("finished", "")
    assert not count
    (folder / "summary.json").write_text("{}")
    assert cache.state(folder)[0] == "damaged"
    with pytest.raises(UserError, match=r"summary\.json is damaged: status: is missing"):
        cache.load(folder)
    (folder / "summary.json").unlink()
    assert cache.state(folder) == ("unfinished", "")
    shutil.rmtree(folder)
    assert cache.state(folder) == ("new", "")


def test_properties_of_a_run_read_nothing(place: Path) -> None:
    run = storylab.load_run(folders(place)[0])
    shutil.rmtree(place)
    assert run.config.max_iters == 4 and run.results.iterations == 5
    assert run.validation.loss == run.loss and len(run.position_losses) == 16
    assert [point.iteration for point in run.evaluations] == [2, 4]
    seconds = np.cumsum([row.step_seconds for row in run.iterations])
    assert run.evaluations[0].seconds == pytest.approx(seconds[1])
    assert {type(row) for row in run.rows} == {IterationRow, EvaluationRow, QuantizationRow}


def test_what_is_written_is_read_back(place: Path) -> None:
    """Every file of a run, through its type, to the same JSON; American names are in the code alone."""
    folder = folders(place)[0]
    run = RunFolder(folder)
    for name, value in (
        ("environment.json", run.read_environment()),
        ("data.json", run.read_data()),
        ("summary.json", run.read_summary()),
    ):
        assert msgspec.to_builtins(value) == json.loads((folder / name).read_text())
    assert to_dict(run.read_config()) == json.loads((folder / "config.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert msgspec.to_builtins(run.read_rows()) == rows
    assert "utilisation_percent" in rows[-1] and "utilisation_percent" in json.dumps(rows)
    run.append_rows([row for row in run.read_rows() if isinstance(row, IterationRow)][:1])
    assert len(run.read_rows()) == len(rows) + 1


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    row = EvaluationRow(iteration=1, train_loss=float("nan"), val_loss=1.0, best=True)
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunFolder(tmp_path).append_rows([row])
    assert not list(tmp_path.iterdir())


def test_a_later_version_may_write_more(place: Path) -> None:
    folder = folders(place)[0]
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(json.dumps(json.loads(line) | {"later": {}}) for line in lines))
    for name in ("environment.json", "data.json", "summary.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"later": [1, None, "x"]}))
    assert load_run(folder).finished
    # What is not known is kept where a resumed run cuts its rows and notes its stage.
    run = RunFolder(folder)
    run.truncate_to(3, run.read_config(), {"compile_fault": "none"})
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert all("later" in row and row["iteration"] < 3 for row in kept)
    assert sum(row["kind"] == "iteration" for row in kept) == 3
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["later"] == [1, None, "x"]
    (stage,) = run.read_environment().resumed
    assert (stage.iteration, stage.compile_fault) == (3, "none")
    assert run.read_summary() is None
    assert not any(
        (folder / f"{name}_losses.npy").exists() for name in ("story", "test", "position")
    )


# Versions of the code


def test_code_versions_that_give_equal_bits_are_one(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = folders(place)[0], folders(place)[2]
    path = a / "environment.json"
    old = "0" * 64
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code_sha256": old}))

    def confounds() -> str:
        arms = [Arm(folder.name, (load_run(folder),)) for folder in (a, b)]
        allowed = frozenset({"learning_rate", "seed", "data_seed"})
        return " ".join(compare_arms(*arms, allowed).confounds)

    assert "code: 2 versions (00000000" in confounds()
    now = load_run(b).environment.code_sha256
    table = {old: "middle", "middle": now}
    monkeypatch.setattr(provenance, "EQUIVALENT_CODE", table)
    assert "code" not in confounds()


def test_a_representative_stands_for_itself() -> None:
    assert representative("a", {}) == "a"
    assert representative("a", {"a": "b", "b": "c"}) == representative("c", {"a": "b"}) == "c"
    with pytest.raises(AssertionError, match="circle"):
        representative("a", {"a": "b", "b": "a"})


def test_the_table_of_code_versions_is_well_formed() -> None:
    for code in provenance.EQUIVALENT_CODE:
        assert len(code) == len(representative(code)) == 64


def test_modules_that_decide_numbers_exist() -> None:
    root = Path(storylab.__file__).parent
    for name in (*provenance.NUMERIC_CODE, *provenance.NON_NUMERIC_MODULES):
        assert (root / name).exists(), name


def test_a_python_run_is_the_run_of_its_folder(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run = storylab.train(tiny_config(out_dir=tmp_path / "run", max_iters=1))
    assert isinstance(run, Run) and run.finished
    assert storylab.load_run(tmp_path / "run").loss == run.loss
