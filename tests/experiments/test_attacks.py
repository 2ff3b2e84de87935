"""Ways to get a wanted verdict out of runs that do not show it: each has no effect, or is named.

More are in test_confirm.py (arms chosen and judged on the same seeds or stories), test_neighbors.py (seeds
chosen by hand), test_looks.py and test_family.py (looking often).
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from experiment_folder import Lab
from made_arms import RATES, made
from samples import TWO_RATES, tiny
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.experiments.compare import compare_contests
from storylab.experiments.comparison import BETTER, CONFOUNDED, DIVERGED, Arm, Comparison
from storylab.experiments.contest import Contest
from storylab.experiments.family import Rules
from storylab.experiments.outcome import Outcome, load_outcome
from storylab.experiments.registration import exploratory_reasons, registration_lines
from storylab.experiments.verdicts import verdict_line
from storylab.record.run import Run, load_run
from storylab.training.train import train

RULES = Rules((3, 5, 8), tuple(range(1, 9)), "own")
BASE = [3.5, 3.4, 3.6, 3.45, 3.55, 3.52, 3.48, 3.5, 3.61, 3.44]
STEADY = [-0.1, -0.1001, -0.0999]


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One finished run, as the pattern of others."""
    out = tmp_path_factory.mktemp("attacks") / "run"
    config = tiny(dataset, out, max_iters=4, gradient_accumulation_steps=1, eval_interval=2)
    train(config)
    return load_run(config.out_dir)


def judged(arms: list[Arm], baseline: Arm, rules: Rules = RULES) -> list[Comparison]:
    return compare_contests([Contest(arm, baseline, RATES) for arm in arms], rules)


def arm(run: Run, differences: list[float]) -> Arm:
    losses = [b + d for b, d in zip(BASE, differences, strict=False)]
    return made(run, losses, learning_rate=0.5)


def base(run: Run, seeds: int) -> Arm:
    return made(run, BASE[:seeds], "base")


def test_more_seeds_between_looks_change_no_verdict(run: Run) -> None:
    """Adding seeds until a difference shows: 25 % wrong findings by 20 seeds if every look counts."""
    open_still = [0.01, -0.02, 0.013]
    (first,) = judged([arm(run, open_still)], base(run, 3))
    (fourth,) = judged([arm(run, [*open_still, -9.0])], base(run, 4))
    assert fourth.verdict == first.verdict and fourth.ends == first.ends
    assert fourth.judgement.extra_seeds == 1
    assert "With all 4 seeds, unplanned: e-value" in verdict_line(fourth)


def test_more_seeds_after_the_last_look_change_no_verdict(run: Run) -> None:
    rng = np.random.default_rng(7)
    eight = list(rng.normal(-0.002, 0.01, 8))
    (last,) = judged([arm(run, eight)], base(run, 8))
    (more,) = judged([arm(run, [*eight, -0.5, -0.5])], base(run, 10))
    assert more.verdict == last.verdict and more.ends == last.ends
    assert more.judgement.look == 8 and more.judgement.next_look is None
    assert "e-value" in verdict_line(more)


@pytest.mark.parametrize("fault", ["diverged", "confounded"])
def test_a_bad_seed_after_the_look_takes_no_settled_verdict_back(run: Run, fault: str) -> None:
    """Neither an unwanted verdict nor that of another arm can be got rid of by one more seed."""
    bad = arm(run, [*STEADY, 0.0])
    spoiled = spoil(bad.runs[-1], fault)
    arms = [Arm("bad", (*bad.runs[:-1], spoiled)), arm(run, STEADY), arm(run, STEADY)]
    moderated = dataclasses.replace(RULES, variance="moderated")
    before = judged([arm(run, STEADY) for _ in range(3)], base(run, 4), moderated)
    after = judged(arms, base(run, 4), moderated)
    assert [c.verdict for c in before] == [BETTER] * 3
    assert [c.verdict for c in after] == [BETTER] * 3
    assert [c.ends for c in after] == [c.ends for c in before]


@pytest.mark.parametrize(("fault", "verdict"), [("diverged", DIVERGED), ("confounded", CONFOUNDED)])
def test_a_bad_seed_of_the_look_counts(run: Run, fault: str, verdict: str) -> None:
    bad = arm(run, STEADY)
    (c,) = judged([Arm("bad", (*bad.runs[:-1], spoil(bad.runs[-1], fault)))], base(run, 3))
    assert c.verdict == verdict and not c.settled


def spoil(run: Run, fault: str) -> Run:
    if fault == "diverged":
        return dataclasses.replace(run, state=DIVERGED)
    other = structs.replace(run.environment, code_sha256="other")
    return dataclasses.replace(run, environment=other)


def test_judging_arms_in_windows_of_other_lengths_is_a_confound(run: Run) -> None:
    """A loss in longer windows is lower: the ruler would be the factor."""
    length = run.config.block_size
    longer = made(run, [3.0, 2.9, 3.1], "longer", block_size=2 * length, batch_size=2)
    for judged_at, verdict in ((length, BETTER), (2 * length, CONFOUNDED)):
        runs = tuple(evaluated_at(r, judged_at) for r in longer.runs)
        contest = Contest(Arm("longer", runs), base(run, 3), frozenset({"block_size"}))
        (c,) = compare_contests([contest], RULES)
        assert c.verdict == verdict
    assert f"evaluation: windows of {2 * length} tokens against {length}" in verdict_line(c)


def evaluated_at(run: Run, length: int) -> Run:
    validation = structs.replace(run.validation, block_size=length)
    return dataclasses.replace(run, summary=structs.replace(run.results, validation=validation))


@pytest.fixture(scope="module")
def finished(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs in which a registered experiment has had its four runs."""
    lab = Lab(tmp_path_factory.mktemp("finished"), dataset)
    lab.record(train=True)
    return lab.runs


@pytest.fixture
def trained(finished: Path, tmp_path: Path, dataset: Dataset) -> Lab:
    lab = Lab(tmp_path, dataset)
    shutil.copytree(finished, lab.runs)
    return lab


def outcome(lab: Lab, name: str = "rates") -> Outcome:
    return load_outcome(lab.runs / "experiments" / f"{name}.json")


def reasons(lab: Lab, name: str = "rates") -> str:
    (comparison,) = outcome(lab, name).comparisons
    return verdict_line(comparison).partition("Exploratory: ")[2]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("margin = 0.02", "margin = 5.0", "margin changed after 4 of 4 runs"),
        ('baseline = "low"', 'baseline = "high"', "baseline changed after 4 of 4 runs"),
        ("seeds = [1, 2]", "seeds = [2, 7]", "seeds changed after"),
        ("looks = [2, 3]", "looks = [2, 4]", "looks changed after"),
        ("margin = 0.02", 'margin = 0.02\nvariance = "own"', "variance changed after"),
        (
            "[config]",
            '[[expect]]\ntext = "near"\nmetric = "loss_difference"\narm = "high"\nat_most = 9.0\n[config]',
            "expectations changed after",
        ),
    ],
)
def test_a_plan_that_is_changed_after_its_runs_makes_verdicts_exploratory(
    trained: Lab, old: str, new: str, named: str
) -> None:
    assert reasons(trained) == ""
    assert old in TWO_RATES
    trained.record(TWO_RATES.replace(old, new))
    assert named in reasons(trained)
    trained.record(TWO_RATES)  # Changed back: the record keeps both changes.
    assert named in reasons(trained)


def test_a_deleted_record_is_not_registered_before_its_runs(trained: Lab) -> None:
    (trained.runs / "experiments" / "rates.json").unlink()
    trained.record()
    late = "registered after 4 of 4 runs had finished, so that 2 differences could be known"
    assert late in reasons(trained)


def test_a_second_file_with_chosen_seeds_says_that_it_came_after_the_runs(trained: Lab) -> None:
    """Chosen among seeds that the first experiment has: its verdicts are exploratory."""
    record = trained.record(TWO_RATES.replace("seeds = [1, 2]", "seeds = [2, 1]"), "chosen")
    (line,) = registration_lines(record)
    assert line.startswith("registered after 4 of 4 runs had finished, all of them for another")
    assert line.endswith("so that 2 differences could be known")
    assert exploratory_reasons(record) == [line]


def test_trained_again_is_said_and_the_first_runs_are_kept(trained: Lab) -> None:
    before = {r.folder.name: r.loss for r in outcome(trained).runs}
    record = trained.record(train=True, fresh=True)
    assert any("--fresh" in line for line in registration_lines(record))
    # A folder that was set aside is no other seed, and on a processor the bits are the same.
    assert {r.folder.name: r.loss for r in outcome(trained).runs} == before


def test_a_file_cannot_call_itself_a_confirmation(trained: Lab) -> None:
    """Its seeds may have been searched: `experiment confirm` alone chooses fresh ones."""
    with pytest.raises(UserError, match="stage"):
        trained.load('stage = "confirm"\n' + TWO_RATES)
