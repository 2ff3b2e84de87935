"""compare: runs that were not given, the plan that given runs belong to, and exit codes by verdict."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import msgspec
import pytest

from damage import change
from experiment_folder import Lab
from record_folders import Opened
from storylab.cli import main
from storylab.data.dataset import Dataset
from storylab.documents.compare import CompareDocument
from storylab.experiments import comparison as words
from storylab.experiments.by_hand import NO_PLAN, compare_given
from storylab.experiments.compare import group_runs
from storylab.experiments.comparison import EXIT_CODES, exit_code
from storylab.experiments.comparison_document import experiment_document
from storylab.experiments.neighbors import find_neighbors
from storylab.experiments.outcome import load_outcome
from storylab.experiments.records import FolderCache
from storylab.record.run import load_run

GUIDE = Path(__file__).parents[2] / "docs/guide"


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of an experiment that was registered before its first run: two arms, two seeds."""
    lab = Lab(tmp_path_factory.mktemp("neighbors"), dataset)
    lab.record(train=True)
    return lab.runs


def folder_of(runs: Path, arm: str, seed: int) -> Path:
    record = json.loads((runs / "experiments/rates.json").read_text())
    (cell,) = (cell for cell in record["cells"] if cell["arm"] == arm)
    return runs / str(cell["runs"][str(seed)])


def all_runs(runs: Path, first: str = "low") -> list[Path]:
    arms = sorted(("low", "high"), key=lambda arm: arm != first)
    return [folder_of(runs, arm, seed) for arm in arms for seed in (1, 2)]


def another_seed(folder: Path, seed: int) -> Path:
    """A copy of a run as if it were of another seed."""
    copy = folder.with_name(re.sub(r"s\d+$", f"s{seed}", folder.name))
    shutil.copytree(folder, copy)
    change(copy / "config.json", seed=seed, data_seed=seed)
    return copy


def lines(capsys: pytest.CaptureFixture[str], *args: object) -> list[str]:
    assert main(["compare", *map(str, args)]) == 0
    return capsys.readouterr().out.splitlines()


def compared(capsys: pytest.CaptureFixture[str], *args: object) -> CompareDocument:
    return msgspec.json.decode("\n".join(lines(capsys, *args, "--json")), type=CompareDocument)


def test_runs_that_were_not_given_are_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    low = folder_of(runs, "low", 1)
    third, fourth = another_seed(low, 3), another_seed(low, 4)
    other_code = another_seed(low, 5)
    change(other_code / "environment.json", code_sha256="0" * 64)
    set_aside = low.with_name(f"{low.name}.old1")
    again = low.with_name("again")
    for copy in (set_aside, again):
        shutil.copytree(low, copy)
    unfinished, damaged = another_seed(low, 6), another_seed(low, 7)
    (unfinished / "summary.json").unlink()
    (damaged / "config.json").write_text("{")
    given = all_runs(runs)
    change(runs / "experiments/rates.json", registered=None)
    found = compared(capsys, *given)
    assert found.experiment is None and found.runs == list(map(str, given))
    (near,) = found.neighbors
    assert near.arm == low.name and (near.given_seeds, near.all_seeds) == (2, 4)
    assert near.other_seeds == [str(third), str(fourth)]
    assert sorted(near.repeats) == sorted([str(set_aside), str(again)])
    assert near.other_code == [str(other_code)]
    (only,) = found.comparisons
    assert only.exploratory == [NO_PLAN, f"chosen by hand: 2 of 4 seeds of {low.name}"]
    text = lines(capsys, *given)
    assert f"chosen by hand: 2 of 4 seeds of {low.name}" in text[0]
    assert any(line.startswith("  not given, ") and str(third) in line for line in text)
    assert any(str(set_aside) in line and "not counted" in line for line in text)


def test_of_other_runs_the_small_files_are_read_once(runs: Path) -> None:
    low = folder_of(runs, "low", 1)
    other = another_seed(low, 3)
    cache, opened = FolderCache(), Opened()
    given = [cache.load(folder) for folder in all_runs(runs)]
    with opened.under(other) as files:
        find_neighbors(group_runs(given), cache)
        find_neighbors(group_runs(given), cache)
    names = {Path(path).name for path in files}
    assert names == {"config.json", "data.json", "environment.json"}
    assert files[str(other / "config.json")] == 1


def test_runs_of_a_registered_plan_are_judged_by_it(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low = folder_of(runs, "low", 1)
    found = compared(capsys, *all_runs(runs))
    outcome = load_outcome(runs / "experiments/rates.json")
    assert found.experiment == "rates" and found.neighbors == []
    (only,) = found.comparisons
    assert (only.arm, only.baseline, only.look) == ("high", "low", 2)
    assert only.exploratory == [] and only.margin_nats_per_token == 0.02
    assert found.comparisons == experiment_document(outcome).comparisons
    text = lines(capsys, *all_runs(runs))
    assert text[0] == "All runs of rates, judged by its registered plan"
    assert not any("xploratory" in line for line in text)
    set_aside = low.rename(low.with_name(f"{low.name}.old1"))
    shutil.copytree(set_aside, low)
    rerolled = compared(capsys, *all_runs(runs))
    assert rerolled.experiment == "rates" and rerolled.comparisons[0].exploratory == []
    assert rerolled.neighbors[0].arm == "low"
    assert rerolled.neighbors[0].repeats == [str(set_aside)]
    assert any(str(set_aside) in note for note in rerolled.comparisons[0].notes)


@pytest.mark.parametrize(
    ("change_of_choice", "reason"),
    [
        ("one seed", NO_PLAN),
        ("other baseline", "rates was registered with another baseline"),
        ("other margin", "rates was registered with another margin"),
        ("not registered", NO_PLAN),
        ("confirmation", "rates is judged on the test split"),
    ],
)
def test_any_other_choice_is_exploratory(runs: Path, change_of_choice: str, reason: str) -> None:
    given, margin = all_runs(runs), None
    if change_of_choice == "one seed":
        given = given[::2]
    elif change_of_choice == "other baseline":
        given = all_runs(runs, "high")
    elif change_of_choice == "other margin":
        margin = 0.5
    elif change_of_choice == "confirmation":
        change(runs / "experiments/rates.json", stage="confirm")
    else:
        change(runs / "experiments/rates.json", registered=None)
    found = compare_given([load_run(folder) for folder in given], margin, FolderCache())
    assert found.experiment == ""
    (only,) = found.comparisons
    assert only.exploratory[0].startswith(reason)
    chosen = [why for why in only.exploratory if why.startswith("chosen by hand: 1 of 2 seeds")]
    assert len(chosen) == 2 * (change_of_choice == "one seed")


def test_a_plan_that_was_changed_later_leaves_its_verdicts_exploratory(runs: Path) -> None:
    path = runs / "experiments/rates.json"
    late = {"time": "t", "what": "margin", "before": 0.05, "after": 0.02}
    change(path, amendments=[late | {"runs_finished": 4, "runs_planned": 4}])
    found = compare_given([load_run(folder) for folder in all_runs(runs)], None, FolderCache())
    assert found.experiment == "rates"
    assert found.comparisons[0].exploratory == ("margin changed after 4 of 4 runs",)


def test_the_document_of_an_experiment_has_its_plan(runs: Path) -> None:
    path = runs / "experiments/rates.json"
    late = {"time": "t", "what": "margin", "before": 0.05, "after": 0.02}
    look = {"time": "t", "seeds": 2, "settled": ["high"]}
    expectation = {"text": "It helps", "metric": "loss_difference", "arm": "high"}
    bounds = {"at_least": None, "at_most": 5.0, "condition": None}
    change(
        path,
        amendments=[late | {"runs_finished": 4, "runs_planned": 4}],
        looks_taken=[look],
        openings=[{"time": "t", "seeds": 5}],
        expectations=[expectation | bounds],
    )
    outcome = load_outcome(path)
    found = experiment_document(outcome)
    assert (found.name, found.title, found.baseline) == ("rates", "Two rates", "low")
    assert found.registration is not None and found.registration.runs_finished == 0
    (amendment,) = found.amendments
    assert amendment.sentence == "margin 0.05 -> 0.02 after 4 of 4 runs: exploratory"
    assert (amendment.key, amendment.runs_planned) == ("margin", 4)
    assert found.looks_taken[0].settled == ["high"] and found.openings[0].seeds == 5
    (checked,) = found.expectations
    assert checked.value == outcome.expectations[0].value and checked.at_most == 5.0
    assert found.exit_code == EXIT_CODES[outcome.comparisons[0].verdict]
    assert (found.seeds, found.looks, found.conditions) == ([1, 2], [2, 3], [])
    change(path, registered=None, amendments=[])
    assert experiment_document(load_outcome(path)).registration is None


# Exit codes


def verdict_words() -> set[str]:
    """Every verdict that a comparison can have, from the names of the module."""
    names = ("BETTER", "WORSE", "EQUIVALENT", "UNDECIDED", "BETTER_WITHIN", "WORSE_WITHIN")
    names = (*names, "NOT_JUDGED")
    return {getattr(words, name) for name in (*names, "DIVERGED", "CONFOUNDED")}


def test_every_verdict_has_a_code_and_the_guide_lists_them() -> None:
    assert EXIT_CODES.keys() == verdict_words()
    page = (GUIDE / "command-line.md").read_text(encoding="utf-8")
    table = page.partition("| verdict | code |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`.*`) \| (\d+) \|$", table, re.MULTILINE)
    assert {word: int(code) for row, code in rows for word in re.findall("`(.+?)`", row)} == (
        EXIT_CODES
    )
    in_the_page = (GUIDE / "comparing.md").read_text(encoding="utf-8")
    assert all(f"`{word}`" in in_the_page for word in EXIT_CODES)


def test_of_several_arms_the_worst_counts() -> None:
    order = ["confounded", "diverged", "worse", "undecided", "equivalent", "better"]
    for number, verdict in enumerate(order):
        assert exit_code(order[number:]) == exit_code(reversed(order[number:]))
        assert exit_code(order[number:]) == EXIT_CODES[verdict]
    assert exit_code([]) == 0


def test_the_verdict_is_the_exit_code_if_asked(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = list(map(str, all_runs(runs)))
    (only,) = compared(capsys, *given).comparisons
    assert main(["compare", *given, "--exit_code"]) == EXIT_CODES[only.verdict]
    assert main(["compare", *given[::2], "--exit_code"]) == EXIT_CODES["undecided"]
    change(Path(given[0]) / "summary.json", status="diverged", reason="at 2", validation=None)
    assert main(["compare", *given, "--exit_code"]) == EXIT_CODES["diverged"]
    assert main(["compare", *given]) == 0
    for folder in given[2:]:
        change(Path(folder) / "config.json", weight_decay=0.3)
    capsys.readouterr()
    assert main(["compare", *given, "--exit_code", "--json"]) == EXIT_CODES["confounded"]
    found = msgspec.json.decode(capsys.readouterr().out, type=CompareDocument)
    assert found.exit_code == EXIT_CODES["confounded"]
    assert found.comparisons[0].verdict_interval is None and found.comparisons[0].recipes is None


def test_a_run_that_was_left_out_is_in_the_document_and_an_error(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = list(map(str, all_runs(runs)))
    (runs / Path(given[3]).name / "summary.json").write_text("{")
    assert main(["compare", *given, "--json", "--exit_code"]) == 2
    captured = capsys.readouterr()
    found = msgspec.json.decode(captured.out, type=CompareDocument)
    assert len(found.left_out) == 1 and "summary.json" in found.left_out[0]
    assert captured.err.count("\n") == 1 and "left out" in captured.err
    # Without a second arm there is no document.
    (runs / Path(given[2]).name / "summary.json").write_text("{")
    assert main(["compare", *given, "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("summary.json") == 2
