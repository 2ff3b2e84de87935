"""Factorial experiments: cells and aliases of designs, effects, the error that is promised, and runs."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from executors import train_here
from record_folders import forget_checksums
from storylab.cli import main
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.experiments.blocks import Block
from storylab.experiments.effect_words import design_lines, effect_line, verdict_lines
from storylab.experiments.effects import contrasts, trial_of
from storylab.experiments.experiment import Variance
from storylab.experiments.factorial import Factor, Factorial, design_cells, generators
from storylab.experiments.family import Judgement, Rules, judge
from storylab.experiments.foresight import detectable_at_looks
from storylab.experiments.outcome import Outcome, load_outcome
from storylab.experiments.plan import plan_runs
from storylab.experiments.recording import write_record
from storylab.experiments.records import FolderCache, read_experiment
from storylab.experiments.spec import load_experiment
from storylab.record.folder import SUMMARY
from storylab.record.run import Run
from storylab.reporting.report import write_report

ROOT = Path(__file__).parents[2]
HEAD = """
title = "Two parts"
purpose = "To test factors."
seeds = [1, 2]
looks = [2]
margin = 0.5
[config]
preset = "nano"
n_layer = 1
n_head = 1
n_kv_head = 1
n_embd = 16
n_hidden = 16
dtype = "float32"
max_iters = 6
batch_size = 4
gradient_accumulation_steps = 1
block_size = 16
learning_rate = 1e-2
min_lr = 0.0
warmup_iters = 2
eval_interval = 3
eval_iters = 1
device = "cpu"
"""
TWO = f"""{HEAD}
[factors.norm]
off = {{ qk_norm = false }}
on = {{ qk_norm = true }}
[factors.rate]
low = {{ learning_rate = 1e-2 }}
high = {{ learning_rate = 3e-2 }}
"""
HALF = f"""{TWO}
[factors.beta]
a = {{}}
b = {{ beta1 = 0.8 }}
""".replace("margin = 0.5", "fraction = 2")


def design(count: int, fraction: int = 1) -> Factorial:
    factors = tuple(Factor("abcdefgh"[i], ("off", "on"), (f"f{i}",)) for i in range(count))
    return Factorial(factors, fraction, design_cells(count, fraction))


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "parts.toml").write_text(text)
    return tmp_path / "parts.toml"


# Designs


def shared(cells: tuple[tuple[int, ...], ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two effects are estimated by the same split of the cells, by counting."""
    halves = [frozenset(i for i, c in enumerate(cells) if sum(c[f] for f in e) % 2) for e in (a, b)]
    rest = frozenset(range(len(cells))) - halves[1]
    return halves[0] in (halves[1], rest)


@pytest.mark.parametrize(
    ("count", "fraction"), [(2, 1), (3, 1), (3, 2), (4, 2), (5, 2), (5, 4), (6, 4), (7, 8), (8, 16)]
)
def test_aliases_are_the_effects_with_one_split_of_the_cells(count: int, fraction: int) -> None:
    d = design(count, fraction)
    assert len(d.cells) == 2**count // fraction == len(set(d.cells))
    assert d.cells[0] == (0,) * count
    every = [e for size in (1, 2) for e in combinations(range(count), size)]
    classes: list[list[tuple[int, ...]]] = []
    for effect in every:
        for known in classes:
            if shared(d.cells, known[0], effect):
                known.append(effect)
                break
        else:
            classes.append([effect])
    assert [[e.factors, *e.aliases] for e in d.effects] == classes
    assert all(len(c[1:]) == 0 or len(c[1]) == 2 for c in classes)  # no two main effects share


@pytest.mark.parametrize(
    ("count", "fraction", "resolution"),
    # Box, Hunter and Hunter, Statistics for Experimenters, table 6.22.
    [
        (3, 2, 3),
        (4, 2, 4),
        (5, 2, 5),
        (5, 4, 3),
        (6, 2, 6),
        (6, 4, 4),
        (6, 8, 3),
        (7, 4, 4),
        (7, 8, 4),
        (8, 4, 5),
    ],
)
def test_a_fraction_has_the_best_resolution(count: int, fraction: int, resolution: int) -> None:
    cells = design_cells(count, fraction)
    for size in range(1, count + 1):
        constant = [
            w
            for w in combinations(range(count), size)
            if len({sum(c[f] for f in w) % 2 for c in cells}) == 1
        ]
        if constant:
            break
    assert size == resolution
    assert len(generators(count, fraction)) == fraction.bit_length() - 1


@pytest.mark.parametrize(
    ("count", "fraction", "message"),
    [
        (1, 1, "has 1: a factorial experiment has 2 to 8"),
        (9, 1, "has 9"),
        (3, 3, "a power of 2|another power of 2"),
        (3, 0, "another power of 2"),
        (2, 2, "main effects would share an estimate; use 1"),
        (4, 4, "use 1 or 2"),
        (4, 2**70, "main effects would share"),
        (8, 1, "256 cells, more than 128"),
    ],
)
def test_a_design_that_cannot_be_used_is_refused(count: int, fraction: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        design_cells(count, fraction)


# Effects


@pytest.mark.parametrize(("count", "fraction"), [(2, 1), (3, 1), (4, 1), (5, 2)])
def test_effects_are_those_of_least_squares_with_blocks(count: int, fraction: int) -> None:
    """Against a fit with a column for every seed, and 0/1 columns centered for the factors."""
    d, seeds = design(count, fraction), 5
    rng = np.random.default_rng(count)
    losses = rng.normal(3, 1, (len(d.cells), seeds)) + rng.normal(0, 2, seeds)
    levels = np.array(d.cells) - 0.5
    columns = [levels[:, list(e.factors)].prod(axis=1) for e in d.effects]
    table = np.array(
        [
            [*(col[c] for col in columns), *np.eye(seeds)[s]]
            for c, s in product(range(len(d.cells)), range(seeds))
        ]
    )
    fitted = np.linalg.lstsq(table, losses.reshape(-1), rcond=None)[0][: len(columns)]
    ours = [contrasts(e, d.cells, losses).mean() for e in d.effects]
    np.testing.assert_allclose(ours, fitted, atol=1e-10)


def test_an_effect_and_an_interaction_are_plain_differences() -> None:
    d = design(2)
    losses = np.array([3.0, 2.9, 2.7, 2.0])  # off off, off on, on off, on on
    a, b, both = (float(contrasts(e, d.cells, losses)) for e in d.effects)
    assert a == pytest.approx((2.7 + 2.0) / 2 - (3.0 + 2.9) / 2)
    assert b == pytest.approx((2.9 + 2.0) / 2 - (3.0 + 2.7) / 2)
    assert both == pytest.approx((2.0 - 2.9) - (2.7 - 3.0))


def judged(d: Factorial, losses: np.ndarray, rules: Rules) -> list[Judgement]:
    """Judgements of all effects of ``losses [cells, seeds]``."""
    by_seed = {seed: list(losses[:, seed]) for seed in range(losses.shape[1])}
    return judge([trial_of(e, d.cells, by_seed) for e in d.effects], rules)


def test_pooled_variance_is_that_of_all_contrasts() -> None:
    """With every contrast of a design estimated, its residual is the analysis of variance's."""
    d, rng = design(2), np.random.default_rng(0)
    losses = rng.normal(size=(4, 6)) + 5 * rng.normal(size=6)
    rest = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    variance = (rest**2).sum() / (3 * 5)
    found = judged(d, losses, Rules(variance="pooled", shared_baseline=False))
    assert found[0].variance == "pooled"
    for judgement, effect in zip(found, d.effects, strict=True):
        error = np.sqrt((effect.weights(d.cells) ** 2).sum() * variance / 6)
        assert judgement.interval is not None
        assert judgement.interval.standard_error == pytest.approx(error)
        assert judgement.interval.df == 15


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["moderated", "own", "pooled"])
def test_error_and_coverage_are_as_promised(variance: Variance) -> None:
    """No effect anywhere: at most 5 % of experiments name one, over all looks, and 95 % of the plain
    intervals cover zero."""
    d, rng, trials = design(3), np.random.default_rng(7), 500
    rules = Rules((3, 5, 8), tuple(range(8)), variance, shared_baseline=False)
    wrong, covered = 0, []
    for _ in range(trials):
        losses = rng.normal(0, 0.02, (8, 8)) + rng.normal(0, 0.1, 8)
        found = judged(d, losses, rules)
        wrong += any(j.different for j in found)
        plain = judged(d, losses[:, :5], Rules(variance=variance, shared_baseline=False))
        covered += [j.interval.low <= 0 <= j.interval.high for j in plain if j.interval]
    assert wrong / trials < 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)
    assert np.mean(covered) > 0.935


def test_one_factor_at_a_time_needs_as_many_more_runs_as_the_plan_says() -> None:
    """Equal precision of main effects: 3 seeds of 8 cells, and (3 + 1) / 2 times as many runs, 12 seeds of
    3 arms and a baseline."""
    d, rng = design(3), np.random.default_rng(3)
    losses = rng.normal(size=(8, 3, 20_000))
    crossed = contrasts(d.effects[0], d.cells, losses.mean(axis=1))
    arms = rng.normal(size=(4, 12, 20_000)).mean(axis=1)
    assert (4 * 12) / (8 * 3) == 2
    assert np.var(crossed) == pytest.approx(np.var(arms[1] - arms[0]), rel=0.05)
    assert "would need 2 times as many runs" in list(design_lines(d, 3))[-1]
    assert "48 instead of 24" in list(design_lines(d, 3))[-1]


# The file


def test_the_arms_are_the_crossed_cells(tmp_path: Path) -> None:
    experiment = load_experiment(written(tmp_path, TWO))
    names = ("norm=off, rate=low", "norm=off, rate=high", "norm=on, rate=low", "norm=on, rate=high")
    assert experiment.arms == names and experiment.baseline == names[0]
    config = experiment.cell("", "norm=on, rate=high").config
    assert config.model.qk_norm and config.learning_rate == 3e-2
    assert [f.fields for f in experiment.factorial.factors] == [("qk_norm",), ("learning_rate",)]  # type: ignore[union-attr]


def test_a_fraction_halves_the_cells(tmp_path: Path) -> None:
    experiment = load_experiment(written(tmp_path, HALF))
    assert experiment.factorial is not None
    assert len(experiment.arms) == 4 and experiment.arms[0] == "norm=off, rate=low, beta=a"
    lines = list(design_lines(experiment.factorial, 2))
    assert "4 of 8 cells, a half fraction of resolution III" in lines[0]
    assert "  the effect of norm cannot be separated from rate x beta" in lines
    assert "2 times as many runs" in lines[-1] and "16 instead of 8" in lines[-1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[factors.rate]", "[arms]\na = {}\n[factors.rate]", r"\[factors\] and arms"),
        ("title =", 'factor = "qk_norm"\ntitle =', r"\[factors\] and factor"),
        ("title =", "fraction = 3\ntitle =", "another power of 2"),
        ("title =", "fraction = 2\ntitle =", "share an estimate; use 1"),
        (
            "high =",
            "mid = { learning_rate = 2e-2 }\nhigh =",
            "factor 'rate' has 3 levels: it needs two",
        ),
        ("high = { learning_rate = 3e-2 }", "", "factor 'rate' has 1 levels"),
        ("learning_rate = 3e-2", "learning_rate = 1e-2", "level 'high' changes nothing"),
        ("learning_rate = 3e-2", "qk_norm = true", "no single factor covers"),
        (
            "[factors.rate]",
            "[factors.more]\na = {}\nb = { qk_norm = true }\n[factors.rate]",
            "both change qk_norm",
        ),
        ("learning_rate = 3e-2", "learning_rate = 3e-2, beta1 = 0.8", "no single factor covers"),
        ("low = {", 'factor = "schedule"\nlow = {', "which 'schedule' does not cover"),
        ("low = {", 'factor = "scedule"\nlow = {', "perhaps you meant schedule"),
        ("learning_rate = 3e-2", "learning_rat = 3e-2", "factor 'rate'|learning_rat"),
        ("low = {", "low = 3\nhi = {", "level 'low' must be a table"),
        (
            "[factors.rate]",
            "[conditions.c]\nqk_norm = true\n[factors.rate]",
            "condition 'c' sets qk_norm",
        ),
        (
            "learning_rate = 3e-2",
            "learning-rate = 1, learning_rate = 2",
            "given twice in factor 'rate'",
        ),
    ],
)
def test_a_mistake_in_the_factors_is_named(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in TWO
    with pytest.raises(UserError, match=message):
        load_experiment(written(tmp_path, TWO.replace(old, new)))


def test_a_fraction_without_factors_is_refused(tmp_path: Path) -> None:
    text = f"{HEAD}[arms]\na = {{}}\n".replace("title", "fraction = 2\ntitle", 1)
    with pytest.raises(UserError, match=r"\[factors\], which it does not have"):
        load_experiment(written(tmp_path, text))


def test_a_wider_factor_can_be_named(tmp_path: Path) -> None:
    wide = 'high = { learning_rate = 3e-2, ema_fraction = 0.1 }\nfactor = "method"'
    text = TWO.replace("high = { learning_rate = 3e-2 }", wide)
    experiment = load_experiment(written(tmp_path, text))
    assert experiment.factorial is not None
    assert experiment.factorial.factors[1].fields == ("ema_fraction", "learning_rate")


@pytest.mark.slow
def test_the_worked_file_crosses_the_parts_of_fast() -> None:
    experiment = load_experiment(ROOT / "experiments/factorial/fast-parts.toml")
    assert experiment.factorial is not None
    assert len(experiment.arms) == 16 and "resolution IV" in experiment.factorial.size_text
    assert not any(e.aliases for e in experiment.factorial.effects if len(e.factors) == 1)
    # Means of half of the cells: more precise than an arm by a factor of sqrt(2/16).
    alone = load_experiment(ROOT / "experiments/07-learning-rates.toml")
    assert detectable_at_looks(experiment, 1.0)[0][1] < 0.5 * detectable_at_looks(alone, 1.0)[0][1]


# Runs


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a factorial experiment, trained in this process."""
    root = tmp_path_factory.mktemp("factorial")
    experiment = load_experiment(written(root, TWO))
    planned = plan_runs(experiment, dataset, root / "runs")
    write_record(experiment, dataset, planned, root / "runs")
    for run in planned:
        assert train_here(run.config).status == "done"
    return write_record(experiment, dataset, planned, root / "runs")


class Given(FolderCache):
    """Reads runs with other final losses, by the name of their folder."""

    def __init__(self, losses: dict[str, float]) -> None:
        super().__init__()
        self.losses = losses

    def load(self, folder: Path) -> Run:
        run = super().load(folder)
        validation = structs.replace(run.validation, loss=self.losses[folder.name])
        summary = structs.replace(run.results, validation=validation)
        return dataclasses.replace(run, summary=summary)


def with_losses(record: Path, losses: dict[str, list[float]]) -> Outcome:
    """The outcome with other final losses, by arm and in the order of its seeds."""
    names = {cell.arm: cell.runs.values() for cell in read_experiment(record).cells}
    given = {n: loss for arm in losses for n, loss in zip(names[arm], losses[arm], strict=True)}
    return load_outcome(record, Given(given))


@pytest.mark.slow
def test_a_factorial_experiment_is_judged_by_its_effects(trained: Path) -> None:
    outcome = load_outcome(trained)
    assert [e.name for e in outcome.effects] == ["norm", "rate", "norm x rate"]
    losses = np.array([[run.loss for run in cell.arm.finished] for cell in outcome.cells])
    for e in outcome.effects:
        expected = contrasts(e.effect, outcome.factorial.cells, losses)  # type: ignore[union-attr]
        assert e.judgement.interval is not None and not e.confounds
        assert e.judgement.interval.estimate == pytest.approx(expected.mean())
        assert e.judgement.family == 3 and e.judgement.look == 2
    assert {c.verdict for c in outcome.comparisons} == {"not judged by itself"}
    assert len(outcome.comparisons) == 3 and len(verdict_lines(outcome)) == 3
    for c in outcome.comparisons:
        assert not c.confounds and not c.settled


@pytest.mark.slow
def test_the_report_has_effects_and_pictures(trained: Path, tmp_path: Path) -> None:
    folder = write_report(trained.parent.parent, tmp_path / "out")
    text = (folder / "EXPERIMENTS.md").read_text()
    assert (
        "- Factor: norm (off, on) x rate (low, high); all 4 cells; baseline: norm=off, rate=low"
        in text
    )
    assert "| norm (on vs off) | " in text and "| norm x rate | " in text
    assert "Effects on the final loss" in text and "**Effects, in nats:" in text
    assert re.search(r"norm=on, rate=high vs norm=off, rate=low: .* not judged by itself", text)
    page = (folder / "index.html").read_text()
    assert '"effects":{"headings":["effect"' in page


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained.parent.parent, tmp_path / "runs")
    return tmp_path / "runs/experiments" / trained.name


@pytest.mark.slow
def test_the_command_line_shows_plan_and_effects(
    copied: Path, tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, TWO)
    flags = [str(file), "--data_dir", str(dataset.folder), "--runs", str(tmp_path / "runs")]
    assert main(["experiment", "run", *flags, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "Factorial: 2 factors of two levels, all 4 cells; every seed is a block of 4 runs" in out
    assert "interactions: norm x rate" in out and "1.5 times as many runs" in out
    assert "main effects, of 3 effects" in out
    assert main(["experiment", "run", *flags]) == 0
    out = capsys.readouterr().out
    assert "norm (on vs off): " in out and "norm x rate: " in out
    assert "vs norm=off, rate=low" not in out
    assert main(["experiment", "confirm", *flags, "--only", "norm=on, rate=low"]) == 2
    assert "a factorial experiment is confirmed whole" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interaction_says_what_each_factor_does_with_the_other(copied: Path) -> None:
    outcome = with_losses(
        copied,
        {
            "norm=off, rate=low": [3.0, 3.1],
            "norm=off, rate=high": [2.0, 2.1001],
            "norm=on, rate=low": [2.5, 2.5999],
            "norm=on, rate=high": [2.5, 2.6001],
        },
    )
    both = outcome.effects[2]
    assert both.verdict == "interact" and both.settled
    line = effect_line(both)
    assert (
        "interact by 1.000 nats" in line
        and "both together are worse than the sum of each alone" in line
    )
    assert "norm (on vs off): -0.500" in line and "with rate=low, +0.500" in line
    assert "A mean over the levels of rate" in effect_line(outcome.effects[0])
    assert all(e.settled for e in outcome.effects) == bool(outcome.settled_arms())


@pytest.mark.slow
def test_all_cells_stop_when_every_effect_is_settled(copied: Path) -> None:
    outcome = with_losses(
        copied,
        {
            "norm=off, rate=low": [3.0, 3.1],
            "norm=off, rate=high": [2.0, 2.1001],
            "norm=on, rate=low": [2.0, 2.0999],
            "norm=on, rate=high": [1.0, 1.1001],
        },
    )
    words = [e.verdict for e in outcome.effects]
    assert words == ["better", "better", "no interaction within the margin"]
    assert outcome.settled_arms() == {("", arm) for arm in outcome.record.arms[1:]}


@pytest.mark.slow
def test_a_run_that_diverged_leaves_no_effect(copied: Path) -> None:
    record = read_experiment(copied)
    folder = copied.parent.parent / record.cells[3].runs["2"]
    forget_checksums(folder)
    summary = folder / SUMMARY
    data = json.loads(summary.read_text())
    summary.write_text(json.dumps(data | {"status": "diverged", "reason": "loss is nan"}))
    outcome = load_outcome(copied)
    assert {e.verdict for e in outcome.effects} == {"diverged"}
    assert "runs of norm=on, rate=high did" in effect_line(outcome.effects[0])
    assert not outcome.settled_arms()
    # Were seed 1 confounded, each seed would have a reason of its own.
    block = Block("", tuple(cell.arm for cell in outcome.cells), ("why",), True, frozenset({1, 2}))
    assert block.diverged({1}) == () and block.diverged({1, 2}) == ("norm=on, rate=high",)
    assert block.confounded({2}) == () and block.confounded({1, 2}) == ("why",)


@pytest.mark.slow
def test_an_effect_names_the_cells_that_recovered(copied: Path) -> None:
    record = read_experiment(copied)
    folder = copied.parent.parent / record.cells[3].runs["2"]
    forget_checksums(folder)
    data = json.loads((folder / SUMMARY).read_text())
    (folder / SUMMARY).write_text(json.dumps(data | {"skipped_steps": 2}))
    for effect in load_outcome(copied).effects:
        assert (
            "1 of 2 runs of norm=on, rate=high would have diverged: they skipped 2 steps"
            in effect_line(effect)
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["cells"].pop(), "other cells than its arms"),
        (lambda f: f["cells"][0].__setitem__(0, 1), "other cells than its arms|no level of every"),
        (lambda f: f["cells"][1].append(1), "no level of every factor"),
        (lambda f: f["cells"][1].__setitem__(0, 2), "cells"),
        (lambda f: f["factors"].pop(), "factors|level of every factor"),
    ],
)
def test_a_damaged_design_is_named(
    copied: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    data = json.loads(copied.read_text())
    change(data["factorial"])
    copied.write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        read_experiment(copied)


@pytest.mark.slow
def test_a_record_without_a_design_reads(copied: Path) -> None:
    data = json.loads(copied.read_text())
    del data["factorial"]
    copied.write_text(json.dumps(data))
    outcome = load_outcome(copied)
    assert outcome.factorial is None and not outcome.effects
    assert {c.verdict for c in outcome.comparisons} == {"confounded"}
