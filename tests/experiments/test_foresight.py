"""What a plan can see before its first run, against simulation and real runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from executors import InProcess
from reporters import Quiet
from samples import TWO_RATES
from storylab.cli import main
from storylab.data.dataset import Dataset
from storylab.experiments.experiment import Experiment
from storylab.experiments.family import Rules, Trial, judge
from storylab.experiments.foresight import (
    detectable_at_looks,
    expected_spread,
    foresight_lines,
)
from storylab.experiments.plan import plan_runs
from storylab.experiments.scheduler import run_experiment
from storylab.experiments.spec import load_experiment
from storylab.record.index import RunCache

Load = Callable[..., Experiment]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str = TWO_RATES) -> Experiment:
        (tmp_path / "rates.toml").write_text(text)
        return load_experiment(tmp_path / "rates.toml")

    return load


def test_the_difference_is_found_as_often_as_it_says(load: Load) -> None:
    """One arm of four is better by as much as a plan of one look says it can see: found in 80 %."""
    arms = "".join(f"a{i} = {{ learning_rate = {i}e-2 }}\n" for i in range(2, 5))
    text = TWO_RATES.replace("high = {", arms + "high = {").replace("looks = [2, 3]", "looks = [5]")
    experiment = load(text.replace("margin = 0.02\n", ""))
    ((n, size),) = detectable_at_looks(experiment, 0.01)
    rng = np.random.default_rng(1)
    found, count = 0, 600
    for _ in range(count):
        differences = rng.normal(0, 0.01, (4, n))
        differences[0] -= size
        trials = [
            Trial("", dict(enumerate(values.tolist())), frozenset(range(n)))
            for values in differences
        ]
        found += judge(trials, Rules((n,), tuple(range(n))))[0].different
    assert n == 5 and 0.74 < found / count < 0.88


def test_more_seeds_see_more_and_more_arms_see_less(load: Load) -> None:
    text = TWO_RATES.replace("looks = [2, 3]", "looks = [3, 5, 8]")
    few = [size for _, size in detectable_at_looks(load(text), 0.01)]
    assert few[0] > few[1] > few[2]
    more = load(text.replace("high = {", "more = { learning_rate = 3e-2 }\nhigh = {"))
    fewer = [size for _, size in detectable_at_looks(more, 0.01)]
    assert all(b > a for a, b in zip(few, fewer, strict=True))
    one = load(text.replace("looks = [3, 5, 8]", "looks = [1]"))
    assert detectable_at_looks(one, 0.01)[0][1] == math.inf


@pytest.mark.slow
def test_the_spread_comes_from_like_runs(load: Load, dataset: Dataset, tmp_path: Path) -> None:
    experiment, runs = load(), tmp_path / "runs"

    def spread(fingerprint: str = dataset.fingerprint) -> tuple[float | None, str]:
        found = expected_spread(experiment, fingerprint, runs, RunCache())
        return found.nats, found.source

    assert spread()[0] is None
    (_, unit), *_ = [line.split(": ", 1) for line in lines(experiment, dataset, runs)]
    assert "x the spread" in unit
    planned = plan_runs(experiment, dataset, runs, seeds=(1, 2, 3))
    low = [run for run in planned if run.cell.arm == "low"]
    run_experiment(low, InProcess(), Quiet())
    nats, source = spread()
    losses = [run.cache.load(run.folder).loss for run in low]
    corrected = np.var(losses, ddof=1) * 2 / 1.3862943611  # median of chi-squared with 2 df
    assert nats == pytest.approx(math.sqrt(2 * corrected)) and source.startswith("at most")

    run_experiment(planned, InProcess(), Quiet())
    nats, source = spread()
    pairs = [
        a.cache.load(a.folder).loss - b.cache.load(b.folder).loss
        for a, b in zip(planned[::2], planned[1::2], strict=True)
    ]
    assert nats == pytest.approx(math.sqrt(np.var(pairs, ddof=1) * 2 / 1.3862943611))
    assert source.startswith("that of a pair")
    assert spread("other data")[0] is None


def lines(experiment: Experiment, dataset: Dataset, runs: Path) -> list[str]:
    return list(foresight_lines(experiment, dataset.fingerprint, runs, RunCache()))


@pytest.mark.slow
def test_a_dry_run_warns_of_a_margin_that_it_cannot_see(
    load: Load, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(TWO_RATES.replace("margin = 0.02", "margin = 1e-6"))
    file, runs = str(tmp_path / "rates.toml"), str(tmp_path / "runs")
    args = ["experiment", "run", file, "--runs", runs, "--data_dir", str(dataset.folder)]
    assert main(args, executor=InProcess()) == 0
    assert "Seen with" not in capsys.readouterr().out
    assert main([*args, "--dry_run"], executor=InProcess()) == 0
    out = capsys.readouterr().out
    assert "Seen with a chance of 80 %, 1 arm against the baseline: 2 seeds: " in out
    assert "(margin 1e-06)" in out
    assert "Even the look at 3 seeds cannot see a difference of the margin" in out
