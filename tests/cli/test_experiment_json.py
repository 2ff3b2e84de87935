"""experiment run and confirm with --json and --exit_code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from executors import InProcess, Unused
from experiment_folder import Bench
from storylab.data.dataset import Dataset
from storylab.documents.experiment import ExperimentDocument
from storylab.execution.job import Job, Outcome
from storylab.experiments.comparison import EXIT_CODES

Call = Callable[..., tuple[int, str, str]]
"""Runs a verb of `storylab experiment`; see :meth:`experiment_folder.Bench.call`."""


@pytest.fixture
def lab(tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> Call:
    bench = Bench(tmp_path, dataset, capsys)
    bench.write()
    return bench.call


def decoded(out: str) -> ExperimentDocument:
    return msgspec.json.decode(out, type=ExperimentDocument)


@pytest.mark.slow
def test_run_prints_one_document_and_the_rest_on_standard_error(lab: Call) -> None:
    code, out, err = lab("run", "--json")
    found = decoded(out)
    assert code == 0 and (found.name, found.stage, found.scale) == ("rates", "search", None)
    assert "Plan: Two rates" in err and "Report: " in err
    (only,) = found.comparisons
    assert (only.arm, only.baseline, only.condition, only.look) == ("high", "low", None, 2)
    assert only.seeds == only.baseline_seeds == [1, 2] and only.paired
    assert only.sentence in err and found.exit_code == only.exit_code
    assert [look.seeds for look in found.looks_taken] == [2] and found.problems == []
    assert found.registration is not None and found.registration.runs_finished == 0
    # The numbers are those of the text, and the code is that of the verdict.
    code, out, err = lab("run", "--json", "--exit_code", executor=Unused())
    assert code == EXIT_CODES[only.verdict] and decoded(out).comparisons == found.comparisons
    assert lab("run", "--exit_code", executor=Unused())[0] == EXIT_CODES[only.verdict]
    assert lab("run", executor=Unused())[0] == 0


@pytest.mark.slow
def test_confirm_prints_losses_of_the_test_split_and_counts_the_opening(lab: Call) -> None:
    assert lab("run")[0] == 0
    code, out, err = lab("confirm", "--json", "--exit_code")
    found = decoded(out)
    assert (found.name, found.stage, found.variance) == ("rates-confirm", "confirm", "own")
    assert [opening.seeds for opening in found.openings] == [5]
    (only,) = found.comparisons
    assert code == EXIT_CODES[only.verdict] and only.seeds == [4, 5, 6, 7, 8]
    assert "Chosen among 1 arm" in err and not only.preliminary


def test_an_experiment_without_a_finished_run_ends_with_1(lab: Call) -> None:
    def fail(job: Job) -> Outcome:
        return Outcome("failed", "no power")

    for verb in ("run", "confirm"):
        code, out, _ = lab(verb, "--json", "--exit_code", executor=InProcess(fail))
        found = decoded(out)
        assert code == 1 and found.openings == []
        (only,) = found.comparisons
        assert only.verdict == "undecided" and only.recipes is None
        assert any("no power" in text for text in (*only.failures, *found.problems))


@pytest.mark.parametrize("verb", ["run", "confirm"])
def test_a_plan_alone_has_no_document(lab: Call, verb: str) -> None:
    code, out, err = lab(verb, "--dry_run", "--json", executor=Unused())
    assert code == 2 and out == "" and "storylab plan FILE --json" in err
    assert err.count("\n") == 1
