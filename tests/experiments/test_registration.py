"""Registration: what was planned before the first run stays in the record, and so does every change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from damage import change
from experiment_folder import Lab
from samples import TWO_RATES
from storylab.config import FORMER_NAMES
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.experiments import registered_plan
from storylab.experiments.plan import plan_runs
from storylab.experiments.recording import write_record
from storylab.experiments.records import read_experiment
from storylab.experiments.registered_plan import amended_plan, plan_of
from storylab.experiments.registration import exploratory_reasons, registration_lines

KNOWN = "registered after 4 of 4 runs had finished, so that 2 differences could be known"


@pytest.fixture
def lab(tmp_path: Path, dataset: Dataset) -> Lab:
    return Lab(tmp_path, dataset)


@pytest.mark.slow
def test_the_first_run_registers_the_whole_plan(lab: Lab) -> None:
    record = lab.record(train=True)
    registered = record.registered
    assert registered is not None and registered.runs_finished == 0
    plan = registered.plan
    canonical = json.dumps(plan, sort_keys=True, separators=(",", ":"))
    assert registered.sha256 == hashlib.sha256(canonical.encode()).hexdigest()
    assert plan["margin"] == 0.02 and plan["seeds"] == [1, 2] and plan["looks"] == [2, 3]
    assert plan["data"] == lab.dataset.fingerprint
    assert plan["arms"][""]["high"]["learning_rate"] == 1e-2
    assert plan["arms"][""]["high"]["device"] == "cpu"
    assert str(lab.root) not in canonical  # the same on every machine
    assert registration_lines(record) == ["registered before any run"]
    assert exploratory_reasons(record) == []

    again = lab.record()  # after four runs
    assert again.registered == registered and again.amendments == []


@pytest.mark.slow
def test_a_changed_margin_after_runs_is_an_amendment_for_good(lab: Lab) -> None:
    first = lab.record(train=True)
    changed = lab.record(TWO_RATES.replace("margin = 0.02", "margin = 0.05"))
    assert changed.registered == first.registered
    line = "margin 0.02 -> 0.05 after 4 of 4 runs: exploratory"
    assert registration_lines(changed) == ["registered before any run", line]
    assert exploratory_reasons(changed) == ["margin changed after 4 of 4 runs"]

    back = lab.record()
    assert registration_lines(back)[1:] == [
        line,
        "margin 0.05 -> 0.02 after 4 of 4 runs: exploratory",
    ]
    assert lab.record().amendments == back.amendments


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("looks = [2, 3]", "looks = [2, 5]", "looks 2, 3 -> 2, 5"),
        ("looks = [2, 3]", 'looks = [2, 3]\nvariance = "own"', "variance moderated -> own"),
        ('baseline = "low"', 'baseline = "high"', "baseline low -> high"),
        ("seeds = [1, 2]", "seeds = [1, 7]", "seeds 1, 2 -> 1, 7"),
        ("learning_rate = 1e-2", "learning_rate = 2e-2", "arm 'high': learning_rate 0.01 -> 0.02"),
        ("high = {", "more = { learning_rate = 3e-2 }\nhigh = {", "arm 'more' added"),
        ("high = {", "other = {", "arm 'high' removed; arm 'other' added"),
        (
            "[arms]",
            '[[expect]]\ntext = "t"\nmetric = "val_loss"\narm = "low"\nat_most = 9.0\n[arms]',
            "expectations changed",
        ),
    ],
)
def test_every_change_of_the_plan_is_named(lab: Lab, old: str, new: str, line: str) -> None:
    lab.record(train=True, seeds=(1,))
    assert old in TWO_RATES
    record = lab.record(TWO_RATES.replace(old, new))
    (_, found) = registration_lines(record)
    assert found.startswith(line) and found.endswith("runs: exploratory")
    assert len(exploratory_reasons(record)) == 1
    assert lab.record(TWO_RATES.replace(old, new)).amendments == record.amendments


def test_the_amended_plan_is_the_one_in_force(lab: Lab) -> None:
    lab.record()
    text = TWO_RATES.replace("high = {", "more = { learning_rate = 3e-2 }\nhigher = {")
    record = lab.record(text.replace("margin = 0.02", ""))
    experiment = lab.load(text.replace("margin = 0.02", ""))
    assert record.registered is not None
    current = amended_plan(record.registered, record.amendments)
    assert current["margin"] is None
    assert set(current["arms"][""]) == set(experiment.arms)


OF_A_RENAMED_FIELD = (
    TWO_RATES.replace('factor = "learning_rate"', 'factor = "muon_lr"')
    .replace("[config]", '[config]\noptimizer = "muon"\nlearning_rate = 1e-2')
    .replace("low = { learning_rate", "low = { muon_lr")
    .replace("high = { learning_rate", "high = { muon_lr")
)
FACTORIAL = (
    TWO_RATES[: TWO_RATES.index("[arms]")]
    .replace('factor = "learning_rate"', "")
    .replace('baseline = "low"', "")
    + """
[factors.average]
factor = "method"
off = {}
on = { ema_fraction = 0.1, beta2 = 0.9, learning_rate = 2e-3 }
[factors.decay]
low = {}
high = { weight_decay = 0.3 }
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("text", [OF_A_RENAMED_FIELD, FACTORIAL])
def test_a_record_with_former_names_of_fields_has_the_same_plan(lab: Lab, text: str) -> None:
    record = lab.record(text)
    path = lab.runs / "experiments" / "rates.json"
    earlier = path.read_text()
    for former, name in FORMER_NAMES.items():
        earlier = earlier.replace(f'"{name}"', f'"{former}"')
    values = json.loads(earlier)
    for design in (values["factorial"], values["registered"]["plan"]["factorial"]):
        for factor in design["factors"] if design else ():
            factor["fields"].sort()
    assert values != json.loads(path.read_text())
    path.write_text(json.dumps(values))
    read = read_experiment(path)
    assert (read.factor, read.factorial) == (record.factor, record.factorial)
    again = lab.record(text)
    assert again.amendments == [] and again.cells == record.cells
    assert registration_lines(again) == ["registered before any run"]
    assert again.registered is not None
    assert again.registered.plan == values["registered"]["plan"]  # as it was registered
    # A real change of the field is still one.
    changed = text.replace("muon_lr = 1e-2", "muon_lr = 2e-2").replace("n = 0.1", "n = 0.2")
    (change,) = lab.record(changed).amendments
    assert change.what == "arms"


def test_a_change_before_any_run_is_said_and_harmless(lab: Lab) -> None:
    lab.record()
    record = lab.record(TWO_RATES.replace("margin = 0.02", "margin = 0.05"))
    assert registration_lines(record)[1] == "margin 0.02 -> 0.05 before any run had finished"
    assert exploratory_reasons(record) == []


@pytest.mark.slow
def test_a_part_and_more_seeds_of_the_plan_are_no_amendments(lab: Lab) -> None:
    lab.record(train=True, only=("low",), seeds=(1,))
    assert lab.record().amendments == []
    assert lab.record(seeds=(1, 2, 3)).amendments == []
    assert lab.record(TWO_RATES.replace("seeds = [1, 2]", "seeds = [1, 2, 3]")).amendments == []


@pytest.mark.slow
def test_another_hypothesis_is_said_but_changes_no_verdict(lab: Lab) -> None:
    lab.record(train=True)
    record = lab.record(TWO_RATES.replace("The high one", "The low one"))
    assert registration_lines(record)[1] == "hypothesis changed after 4 of 4 runs"
    assert exploratory_reasons(record) == []


@pytest.mark.slow
def test_other_code_is_an_amendment_of_its_own_kind(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.record(train=True)
    monkeypatch.setattr(registered_plan, "code_sha256", lambda: "f" * 64)
    record = lab.record()
    (change,) = record.amendments
    assert (change.what, change.after, change.runs_finished) == ("code", "f" * 64, 4)
    assert exploratory_reasons(record) == []
    monkeypatch.setattr(registered_plan, "representative", lambda code: "the same")
    monkeypatch.setattr(registered_plan, "code_sha256", lambda: "e" * 64)
    assert lab.record().amendments == record.amendments  # a version of equal bits


@pytest.mark.slow
def test_a_deleted_record_does_not_bring_the_first_moment_back(lab: Lab) -> None:
    lab.record(train=True)
    (lab.runs / "experiments" / "rates.json").unlink()
    record = lab.record(seeds=(3,))
    line = KNOWN.replace("4 of 4", "4 of 6")
    assert registration_lines(record) == [line]
    assert exploratory_reasons(record) == [line]


@pytest.mark.slow
def test_another_baseline_of_known_runs_is_said_and_harmless(lab: Lab) -> None:
    """Runs of one arm alone: no difference could be known."""
    lab.record(train=True)
    high = next(line for line in TWO_RATES.splitlines() if line.startswith("high = {"))
    other = high.replace("high", "highest").replace("1e-2", "3e-2")
    record = lab.record(TWO_RATES.replace(high, other), "other")
    line = "registered after 2 of 6 runs had finished, all of them for another experiment"
    assert registration_lines(record) == [line.replace("6", "4")]
    assert exploratory_reasons(record) == []


@pytest.mark.slow
def test_a_second_file_on_known_differences_is_exploratory(lab: Lab) -> None:
    """The same arms renamed, or some of them: their differences were there to be seen."""
    lab.record(train=True)
    record = lab.record(TWO_RATES.replace("high = {", "higher = {"), "other")
    line = (
        "registered after 4 of 4 runs had finished, all of them for another experiment, so that 2 "
        "differences could be known"
    )
    assert registration_lines(record) == [line]
    assert exploratory_reasons(record) == [line]


@pytest.mark.slow
def test_a_record_of_an_older_version(lab: Lab) -> None:
    lab.record(train=True)
    path = lab.runs / "experiments" / "rates.json"
    later = ("registered", "amendments", "looks_taken", "openings", "looks", "variance", "stage")
    values = {k: v for k, v in json.loads(path.read_text()).items() if k not in later}
    path.write_text(json.dumps(values))
    old = read_experiment(path)
    assert registration_lines(old) == ["not registered (record of an older version)"]
    assert exploratory_reasons(old) == ["not registered"]
    assert registration_lines(lab.record()) == [KNOWN]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["{", '{"name": 3}'])
def test_a_damaged_record_is_set_aside_and_the_new_one_says_so(lab: Lab, damage: str) -> None:
    lab.record(train=True)
    path = lab.runs / "experiments" / "rates.json"
    path.write_text(damage)
    record = lab.record()
    assert (path.parent / "rates.json.old1").read_text() == damage
    first, second = registration_lines(record)
    assert first == KNOWN
    assert second.startswith("the record was begun again (the earlier one is ")
    assert "it was set aside as rates.json.old1" in second
    assert exploratory_reasons(record) == [first]
    assert registration_lines(lab.record()) == [first, second]


def test_a_record_that_cannot_be_opened_is_left_where_it_is(lab: Lab) -> None:
    path = lab.runs / "experiments" / "rates.json"
    path.mkdir(parents=True)
    with pytest.raises(UserError, match=r"rates\.json: it is a folder"):
        lab.record()


def test_keys_of_a_later_version_stay(lab: Lab) -> None:
    lab.record()
    path = lab.runs / "experiments" / "rates.json"
    change(path, later=[1])
    lab.record()
    assert json.loads(path.read_text())["later"] == [1]


@pytest.mark.slow
def test_training_everything_again_is_exploratory(lab: Lab) -> None:
    """Whoever knows the losses could train until they please."""
    lab.record(train=True)
    record = lab.record(fresh=True)
    words = "all runs were trained again (--fresh) after 4 of 4 runs"
    assert registration_lines(record)[1] == f"{words}: exploratory"
    assert exploratory_reasons(record) == [words]


def test_an_arm_this_machine_cannot_run_stays_as_it_was_recorded(lab: Lab) -> None:
    text = TWO_RATES.replace('factor = "learning_rate"', 'factor = "precision"').replace(
        "low = { learning_rate = 1e-3 }\nhigh = { learning_rate = 1e-2 }",
        'low = {}\nhigh = { dtype = "nvfp4", backend = "te" }',
    )
    experiment = lab.load(text)
    planned = plan_runs(experiment, lab.dataset, lab.runs, only=("low",))
    path = write_record(experiment, lab.dataset, planned, lab.runs)
    values = json.loads(path.read_text())
    # As a machine with the GPU would have written it.
    cell = next(cell for cell in values["cells"] if cell["arm"] == "high")
    cell["config"] |= {"device": "cuda", "data_seed": 0}
    cell["runs"] = {"1": "nano-0123456789-s1"}
    values["registered"]["plan"]["arms"][""]["high"]["device"] = "cuda"
    path.write_text(json.dumps(values))
    record = read_experiment(write_record(experiment, lab.dataset, planned, lab.runs))
    assert record.amendments == []
    assert record.cells[1].config["device"] == "cuda"
    assert record.cells[1].runs == {"1": "nano-0123456789-s1"}


def test_a_plan_is_plain_json_and_the_same_every_time(lab: Lab) -> None:
    experiment = lab.load()
    plans = [plan_of(experiment, experiment.cells, "f") for _ in range(2)]
    assert plans[0] == plans[1] == json.loads(json.dumps(plans[0]))
