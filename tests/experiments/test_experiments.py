"""Experiments: read from data with every mistake named, run once, resumed, and kept when they fail."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executors import InProcess, Unused, perform_quietly
from record_folders import forget_checksums
from reporters import Watcher
from storylab.cli import main
from storylab.cli.console import ConsoleReporter
from storylab.cli.experiments import estimated, plan_lines
from storylab.config import ModelConfig, TrainConfig, preset_config, recipe_digest
from storylab.data.dataset import Dataset
from storylab.errors import UserError, out_of_memory
from storylab.execution.job import Job, Outcome
from storylab.execution.local import LocalExecutor
from storylab.experiments import factors
from storylab.experiments.attempts import MICROBATCH_NOTE
from storylab.experiments.experiment import Experiment
from storylab.experiments.factors import (
    changed_fields,
    factor_fields,
    infer_factor,
    same_learning_rates,
)
from storylab.experiments.leases import lease_folder
from storylab.experiments.outcome import load_outcome
from storylab.experiments.plan import PlannedRun, plan_runs
from storylab.experiments.recording import write_record
from storylab.experiments.scheduler import run_experiment
from storylab.experiments.skeleton import skeleton
from storylab.experiments.spec import load_experiment
from storylab.model.cost import training_flops
from storylab.optim.schedule import SCHEDULES, learning_rate, telling_iterations
from storylab.planning.estimate import estimate_runs
from storylab.record.folder import SUMMARY, RunFolder
from storylab.record.run import run_state
from storylab.record.schema import IterationRow, Row
from storylab.training.measure import StepTimer

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "experiments").glob("*.toml"))
STUDIES = sorted((ROOT / "experiments").glob("*/*.toml"))

TEN_LINES = """
title = "Two rates"
purpose = "Which is better?"
factor = "learning_rate"
baseline = "low"
seeds = [1, 2]
[config]
{config}
[arms]
low = {{ learning_rate = 1e-3 }}
high = {{ learning_rate = 1e-2 }}
"""
TINY_CONFIG = """
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
warmup_iters = 2
eval_interval = 3
eval_iters = 1
device = "cpu"
"""


def write(path: Path, text: str = TEN_LINES.format(config=TINY_CONFIG)) -> Path:
    path.write_text(text)
    return path


def fails(path: Path, text: str, scale: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_experiment(write(path, text), scale)
    return str(caught.value)


# The file


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_files_behind_the_docs_are_experiments(path: Path) -> None:
    experiment = load_experiment(path)
    assert len(experiment.cells) == len(experiment.arms) > 1
    assert experiment.data.tokenizer == "bpe:4096"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("scale", ["record", "laptop"])
def test_the_shipped_experiments_load_at_both_scales(path: Path, scale: str) -> None:
    experiment = load_experiment(path, scale)
    assert experiment.hypothesis
    if not experiment.waits_for:
        assert experiment.cells and experiment.note


def test_there_are_the_records_seven() -> None:
    assert [path.name[:2] for path in SHIPPED] == [f"0{i}" for i in range(1, 8)]


def test_the_first_experiment_at_record_scale_is_the_record() -> None:
    (cell,) = load_experiment(SHIPPED[0], "record").cells
    assert changed_fields(cell.config, TrainConfig()) == {}


def test_a_single_arm_needs_no_factor(tmp_path: Path) -> None:
    text = TEN_LINES.format(config=TINY_CONFIG).replace('factor = "learning_rate"\n', "")
    load_experiment(write(tmp_path / "a.toml", text.replace("high = { learning_rate = 1e-2 }", "")))
    assert "needs a factor" in fails(tmp_path / "b.toml", text)


def test_an_experiment_that_cannot_run_yet_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "later.toml"
    path.write_text('title = "Later"\npurpose = "Some day."\nwaits_for = "a recipe"\n')
    assert main(["experiment", "run", str(path)]) == 2
    assert "cannot run yet: it waits for a recipe" in capsys.readouterr().err


def test_the_skeleton_is_an_experiment(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    title = 'A "quoted" title \\ back\nand two lines'
    assert main(["experiment", "new", str(path), "--title", title]) == 0
    assert path.read_text() == skeleton(title)
    experiment = load_experiment(path)
    assert experiment.arms == ("1e-3", "3e-3") and experiment.title == title
    assert main(["experiment", "new", str(path)]) == 2


def test_a_file_of_ten_lines_is_enough(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path / "a.toml"))
    assert experiment.first_seeds(4) == (1, 2, 3, 4)
    assert experiment.cell("", "high").config.learning_rate == 1e-2
    assert experiment.cell("", "high").config.model.n_embd == 16


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "Two rates"', 'titel = "x"', "perhaps you meant 'title'"),
        ("learning_rate = 1e-2 }", "learning_rat = 1e-2 }", "--learning_rate.*in arm 'high'"),
        ("learning_rate = 1e-2 }", 'learning_rate = "fast" }', "fast.*in arm 'high'"),
        ("learning_rate = 1e-2 }", "learning_rate = 1e-3 }", "arm 'high' changes nothing"),
        ("1e-2 }", "1e-2, beta1 = 0.8 }", "changes beta1 besides the factor 'learning_rate'"),
        ("1e-2 }", "1e-2, seed = 3 }", "seed is not an arm's to set"),
        ('factor = "learning_rate"', 'factor = "learning_rat"', "perhaps you meant learning_rate"),
        ('baseline = "low"', 'baseline = "lo"', "not one of the arms: low, high"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "a seed counts once"),
        ("seeds = [1, 2]", "seeds = []", "whole numbers"),
        ("seeds = [1, 2]", "margin = 0", "above 0"),
        ("[arms]", "[arms", "not valid TOML"),
        ("learning_rate = 1e-2 }", "learning_rate = [1, 2] }", "single value"),
        ("n_layer = 1", "n_layer = 0", "n_layer is 0"),
        ("n_layer = 1", 'n_layer = 1\ndata_dir = "x"', "use \\[data\\], or --data_dir"),
        ("[arms]", "[scales]\nlaptop = 3\n[arms]", "laptop must be a table"),
        ("n_layer = 1", "n_layers = 1", "perhaps you meant --n_layer; in \\[config\\]"),
        (
            "[arms]",
            "[conditions]\na = { learning_rate = 0.1 }\n[arms]",
            "condition 'a' sets learning_rate, which is for the arms",
        ),
        (
            "[arms]",
            "[conditions]\na = { beta1 = 0.8 }\nb = { beta1 = 0.8 }\n[arms]",
            "'a' and 'b' are the same",
        ),
        (
            "[arms]",
            "[[expect]]\ntext = 'x'\nmetric = 'speed_ratio'\narm = 'low'\nat_most = 1\n[arms]",
            "of the baseline 'low' says nothing",
        ),
        (
            "[arms]",
            "[[expect]]\ntext = 'x'\nmetric = ['val_loss']\narm = 'low'\nat_most = 1\n[arms]",
            "metric .* use one of",
        ),
        ("[config]", "[[expect]]\ntext = 'x'\n[config]", "needs text, metric, arm"),
        # A hyphen is another spelling of an underscore, in every table.
        ("1e-2 }", "1e-2, data-seed = 3 }", "data_seed is not an arm's to set"),
        ("n_layer = 1", 'n_layer = 1\ndata-dir = "x"', "use \\[data\\], or --data_dir"),
        (
            "n_layer = 1",
            "n_layer = 1\nmax-iters = 7",
            r"max_iters is given twice in \[config\], as max-iters and as max_iters",
        ),
        ("1e-2 }", "1e-2, learning-rate = 1 }", "learning_rate is given twice in arm 'high'"),
        ("[arms]", "[conditions.a]\nbeta1 = 0\nbeta-1 = 0\n[arms]", "unknown key 'beta_1'"),
        (
            "[arms]",
            "[conditions.a]\nmax_iters = 1\nmax-iters = 2\n[arms]",
            "max_iters is given twice in condition 'a'",
        ),
        (
            "[arms]",
            "[data]\nbuiltin_stories = 5\nbuiltin-stories = 6\n[arms]",
            r"builtin_stories is given twice in \[data\]",
        ),
        (
            "[arms]",
            "[scales.a.config]\nmax-iters = 5\nmax_iters = 6\n[arms]",
            r"max_iters is given twice in \[config\]",
        ),
        (
            "[arms]",
            "[[expect]]\ntext = 'x'\nmetric = 'val_loss'\narm = 'low'\nat-most = 1\nat_most = 2\n[arms]",
            r"at_most is given twice in \[\[expect\]\]",
        ),
        (
            "title =",
            'waits-for = "a"\nwaits_for = "b"\ntitle =',
            "waits_for is given twice in the file",
        ),
        # Numbers that no float or no count holds.
        ("seeds = [1, 2]", "margin = inf", "margin must be a finite number above 0"),
        ("seeds = [1, 2]", "margin = nan", "margin must be a finite number above 0"),
        ("seeds = [1, 2]", "margin = 1e400", "margin must be a finite number above 0"),
        ("seeds = [1, 2]", f"margin = {'9' * 400}", "margin must be a finite number above 0"),
        ("[arms]", "[scales.a]\nmargin = inf\n[arms]", "margin must be a finite number above 0"),
        ("seeds = [1, 2]", f"seeds = [{'9' * 30}]", "from 0 to 2"),
        ("seeds = [1, 2]", f"seeds = [{'9' * 5000}]", "not valid TOML"),
        ("learning_rate = 1e-2 }", "learning_rate = inf }", "learning_rate is inf"),
        ("learning_rate = 1e-2 }", "learning_rate = nan }", "learning_rate is nan"),
        ("max_iters = 6", "max_iters = 6.0", "must be a whole number, not '6.0'"),
        ("max_iters = 6", f"max_iters = {'9' * 30}", "max_iters is 999.*at most"),
        (
            "[arms]",
            "[[expect]]\ntext = 'x'\nmetric = 'val_loss'\narm = 'low'\nat_most = inf\n[arms]",
            "at_most must be a finite number",
        ),
        # Values that look like flags, names that belong to other programs, text that is none.
        ("n_layer = 1", "n_layer = 1\nhelp = true", "unknown key 'help'"),
        ('dtype = "float32"', 'dtype = "--help"', "invalid choice '--help'"),
        (
            "learning_rate = 1e-2 }",
            "lr = 1e-2 }",
            "unknown key 'lr'; perhaps you meant --learning_rate",
        ),
        ("1e-2 }", "1e-2, softcap = 15.0 }", r"softcap is 15\.0, .*e30b07b .*; in arm 'high'"),
        ("learning_rate = 1e-2 }", "learning_rate = true }", "must be a number, not 'True'"),
        ('device = "cpu"', 'device = "a\\u0000b"', "device cannot be"),
        (
            "[arms]",
            "[data]\ntrain = ['--help']\nvalidation = ['x']\n[arms]",
            "train cannot be '--help'",
        ),
        ("[arms]", "[data]\ntokenizer = 'bpe:many'\n[arms]", "unknown tokenizer 'bpe:many'"),
        ("[arms]", "[scales.'a/b']\n[arms]", "it can have no '/'"),
        ('title = "Two rates"', 'title = "  "', "needs a title"),
        ("[arms]", f"x = {'[' * 2000}\n[arms]", "nested too deep"),
    ],
)
def test_a_mistake_in_the_file_is_named_before_any_time_is_spent(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = TEN_LINES.format(config=TINY_CONFIG)
    assert old in text
    path = tmp_path / "a.toml"
    with pytest.raises(UserError, match=message):
        load_experiment(write(path, text.replace(old, new)))


def test_hyphens_are_read_as_underscores_are(tmp_path: Path) -> None:
    text = TEN_LINES.format(config=TINY_CONFIG)
    hyphens = text.replace("learning_rate = ", "learning-rate = ").replace("max_iters", "max-iters")
    plain = load_experiment(write(tmp_path / "a.toml", text))
    assert load_experiment(write(tmp_path / "a.toml", hyphens)) == plain


def test_removed_fields_are_read_where_they_did_nothing(tmp_path: Path) -> None:
    text = TEN_LINES.format(config=TINY_CONFIG)
    plain = load_experiment(write(tmp_path / "a.toml", text))
    old = text.replace("max_iters =", "zero-init = false\nsoftcap = 0\nmax_iters =")
    assert load_experiment(write(tmp_path / "a.toml", old)) == plain


def test_a_byte_order_mark_and_other_line_ends_are_no_text(tmp_path: Path) -> None:
    text = TEN_LINES.format(config=TINY_CONFIG)
    plain = load_experiment(write(tmp_path / "a.toml", text))
    for odd in (b"\xef\xbb\xbf" + text.encode(), text.replace("\n", "\r\n").encode()):
        (tmp_path / "a.toml").write_bytes(odd)
        assert load_experiment(tmp_path / "a.toml") == plain
    (tmp_path / "a.toml").write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match=r"a\.toml: it is not UTF-8 text"):
        load_experiment(tmp_path / "a.toml")


COURSES = st.fixed_dictionaries(
    {
        "warmup_iters": st.integers(0, 60),
        "schedule": st.sampled_from(list(SCHEDULES)),
        "learning_rate": st.sampled_from([1e-3, 2e-3]),
        "min_lr": st.sampled_from([0.0, 1e-3]),
    }
)


@pytest.mark.slow
@given(max_iters=st.integers(0, 60), one=COURSES, other=COURSES)
@settings(max_examples=500, deadline=None, derandomize=True, database=None)
def test_courses_are_compared_as_at_every_iteration(
    max_iters: int, one: dict[str, Any], other: dict[str, Any]
) -> None:
    a, b = (TrainConfig(max_iters=max_iters, **course) for course in (one, other))
    every = all(learning_rate(a, i) == learning_rate(b, i) for i in range(max_iters + 1))
    assert same_learning_rates(a, b) == every


@pytest.mark.parametrize("change", [{"warmup_iters": 10**8 - 1}, {"schedule": "linear"}])
def test_long_courses_are_told_apart_at_few_iterations(change: dict[str, Any]) -> None:
    a = TrainConfig(max_iters=10**9, warmup_iters=10**8)
    b = dataclasses.replace(a, **change)
    assert not same_learning_rates(a, b) and same_learning_rates(a, dataclasses.replace(a))
    assert len(telling_iterations((a, b), a.max_iters + 1)) < 200


def test_a_long_plan_reads_as_few_learning_rates_as_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counted(config: TrainConfig, iteration: int) -> float:
        read.append(iteration)
        return learning_rate(config, iteration)

    monkeypatch.setattr(factors, "learning_rate", counted)
    text = TEN_LINES.format(config=TINY_CONFIG.replace("max_iters = 6", "max_iters = 100000000000"))
    text = text.replace('factor = "learning_rate"', 'factor = "weight_decay"')
    text = text.replace("{ learning_rate = 1e-3 }", "{ weight_decay = 0.1 }")
    text = text.replace("{ learning_rate = 1e-2 }", "{ weight_decay = 0.0 }")
    experiment = load_experiment(write(tmp_path / "a.toml", text))
    assert experiment.cells[0].config.max_iters == 10**11 and 0 < len(read) < 1000


@pytest.mark.parametrize(
    "title", ["del\x7fchar", "\x01\t\r\n", '"""', "\\u0041", "\u2028 \U0001f600"]
)
def test_a_skeleton_of_any_title_is_an_experiment(tmp_path: Path, title: str) -> None:
    path = tmp_path / "a.toml"
    assert main(["experiment", "new", str(path), "--title", title]) == 0
    assert load_experiment(path).title == title


@pytest.mark.parametrize("title", ["", " \n", "bad\udcffbyte"])
def test_a_title_that_no_file_can_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], title: str
) -> None:
    path = tmp_path / "a.toml"
    assert main(["experiment", "new", str(path), "--title", title]) == 2
    assert "title is" in capsys.readouterr().err and not path.exists()


def test_other_names_for_the_same_course_change_nothing(tmp_path: Path) -> None:
    """Within a run that is all warm-up, cosine and linear are one and the same."""
    text = TEN_LINES.format(config=TINY_CONFIG.replace("warmup_iters = 2", "warmup_iters = 6"))
    text = text.replace("high = { learning_rate = 1e-2 }", 'high = { schedule = "linear" }')
    text = text.replace("low = { learning_rate = 1e-3 }", "low = { }")
    assert "changes nothing" in fails(tmp_path / "a.toml", text)


def test_a_window_that_no_sequence_fills_changes_nothing(tmp_path: Path) -> None:
    text = TEN_LINES.format(config=TINY_CONFIG).replace('"learning_rate"', '"attention"')
    text = text.replace("learning_rate = 1e-3", 'attention = "full"')
    window = text.replace("learning_rate = 1e-2", 'attention = "window:16"')
    assert "changes nothing" in fails(tmp_path / "a.toml", window)
    load_experiment(write(tmp_path / "b.toml", window.replace("window:16", "window:15")))


def test_lengths_are_compared_at_as_many_tokens_an_iteration(tmp_path: Path) -> None:
    text = TEN_LINES.format(config=TINY_CONFIG).replace('"learning_rate"', '"block_size"')
    text = text.replace("learning_rate = 1e-3", "block_size = 16")
    equal = text.replace("learning_rate = 1e-2", "block_size = 32, batch_size = 2")
    load_experiment(write(tmp_path / "a.toml", equal))
    more = text.replace("learning_rate = 1e-2", "block_size = 32")
    assert "changes tokens an iteration besides the factor" in fails(tmp_path / "b.toml", more)


def test_local_stories_are_named_in_the_file(tmp_path: Path) -> None:
    text = TEN_LINES.format(config=TINY_CONFIG)
    data = '[data]\ntrain = ["a.txt", "b.txt"]\nvalidation = ["c.txt"]\nout = "d"\n[config]'
    experiment = load_experiment(write(tmp_path / "a.toml", text.replace("[config]", data)))
    assert experiment.data.train == (Path("a.txt"), Path("b.txt"))
    assert experiment.cells[0].config.data_dir == Path("d")


def test_an_unknown_scale_is_named(tmp_path: Path) -> None:
    assert "it has laptop" in fails(
        tmp_path / "a.toml", TEN_LINES.format(config=TINY_CONFIG) + "\n[scales.laptop]\n", "big"
    )


def test_equal_compute_is_equal_in_floating_point_operations() -> None:
    experiment = load_experiment(ROOT / "experiments/05-model-sizes.toml", "laptop")
    budgets = []
    for arm in experiment.arms:
        config = experiment.cell("equal compute", arm).config
        tokens = (config.max_iters + 1) * config.tokens_per_iteration
        budgets.append(tokens * training_flops(config.model, 4096, config.block_size))
        # The course of the learning rate is stretched as a whole: it ends where the baseline's does.
        assert learning_rate(config, config.max_iters) == pytest.approx(2e-3)
    assert max(budgets) / min(budgets) < 1.02


@pytest.mark.slow
def test_training_flops_are_those_that_torch_counts() -> None:
    """torch counts every product whole, so a causal model's attention twice what it needs."""
    from torch.utils.flop_counter import FlopCounterMode

    from storylab.model.transformer import Transformer

    config = dataclasses.replace(
        preset_config("nano"), model=ModelConfig(3, 2, 1, 128, 288), block_size=64
    )
    model = Transformer(config.model, 4096)
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    ours = training_flops(config.model, 4096, config.block_size)
    causal = 12 * 128 * 3 * (64 + 1) / 2
    assert ours - causal == pytest.approx(6 * (config.model.parameter_count(4096) - 7 * 128))
    # The backward pass of the lean blocks redoes elementwise work and no product that counts.
    assert counter.get_total_flops() / 128 == pytest.approx(ours + causal, rel=0.02)


# Factors


def test_a_factor_covers_its_fields() -> None:
    assert "n_embd" in factor_fields("size") and factor_fields("beta1") == {"beta1"}
    for name in ("seed", "out_dir", "nonsense"):
        with pytest.raises(UserError):
            factor_fields(name)


def test_the_split_into_micro_batches_is_no_difference() -> None:
    a = TrainConfig()
    b = dataclasses.replace(a, batch_size=32, gradient_accumulation_steps=32)
    assert changed_fields(a, b) == {}
    assert set(changed_fields(a, dataclasses.replace(a, batch_size=32))) == {"batch_size"}
    assert set(changed_fields(a, preset_config("50m"))) == {
        "preset", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden",
    }  # fmt: skip


def test_the_factor_of_two_configs_is_found_if_there_is_one() -> None:
    assert infer_factor({"beta1"}) == "beta1"
    assert infer_factor({"max_iters", "warmup_iters"}) == "length"
    assert infer_factor({"learning_rate", "min_lr"}) == "learning_rate"
    assert infer_factor({"beta1", "block_size"}) is None
    assert infer_factor(set()) is None
    # A recipe is made of all of these, but runs that differ in two of them are two factors apart.
    assert infer_factor({"learning_rate", "weight_decay"}) is None
    assert infer_factor({"learning_rate", "batch_size"}) is None
    assert infer_factor({"optimizer", "qk_norm"}) is None
    assert infer_factor({"method", "optimizer", "learning_rate", "qk_norm"}) == "method"


def test_a_recipe_is_its_config_and_data_and_nothing_else() -> None:
    base = TrainConfig(device="cpu", data_seed=1)
    digest = recipe_digest(base, "f")
    assert digest == recipe_digest(
        dataclasses.replace(base, seed=5, data_seed=5, out_dir=Path("x"), log_interval=3), "f"
    )
    split = dataclasses.replace(base, batch_size=32, gradient_accumulation_steps=32)
    assert digest == recipe_digest(split, "f")
    assert digest != recipe_digest(base, "g")
    assert digest != recipe_digest(dataclasses.replace(base, beta1=0.8), "f")


# Running


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return load_experiment(write(tmp_path / "tiny.toml"))


@pytest.fixture
def planned(experiment: Experiment, dataset: Dataset, tmp_path: Path) -> list[PlannedRun]:
    return plan_runs(experiment, dataset, tmp_path / "runs", seeds=(1,))


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2])
def test_an_experiment_runs_once_in_processes_of_its_own(
    planned: list[PlannedRun], slots: int
) -> None:
    watcher = Watcher()
    assert run_experiment(planned, LocalExecutor(slots), watcher) == ["finished", "finished"]
    assert "val loss" in watcher.lines[0]
    before = {run.folder: (run.folder / "metrics.jsonl").read_bytes() for run in planned}
    watcher = Watcher()
    assert run_experiment(planned, Unused(), watcher) == ["finished", "finished"]
    assert all("trained before" in line for line in watcher.lines)
    assert {run.folder: (run.folder / "metrics.jsonl").read_bytes() for run in planned} == before


@pytest.mark.parametrize(("device", "expected"), [("cpu", None), ("cuda", False)])
def test_arms_are_compiled_together_or_not_at_all(
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    expected: bool | None,
) -> None:
    """One arm is too short for a GPU to compile it, and long enough for a CPU."""
    config = f'dtype = "bfloat16"\ndevice = "{device}"\n'
    text = TEN_LINES.format(config=config).replace('"learning_rate"', '"max_iters"')
    for rate, length in (("1e-3", 20), ("1e-2", 200)):
        text = text.replace(f"learning_rate = {rate}", f"max_iters = {length}")
    experiment = load_experiment(write(tmp_path / "lengths.toml", text))
    # Nothing here has a GPU.
    monkeypatch.setattr("storylab.experiments.plan.resolve_device", lambda config: (config, None))
    planned = plan_runs(experiment, dataset, tmp_path / "runs", seeds=(1,))
    assert [run.cell.config.compile for run in planned] == [expected] * 2


@pytest.mark.slow
def test_arms_share_initial_weights_and_data_order(planned: list[PlannedRun]) -> None:
    run_experiment(planned, InProcess(), Watcher())
    a, b = (RunFolder(run.folder).read_environment() for run in planned)
    assert a.initial_weights_sha256 == b.initial_weights_sha256
    assert a.first_batch_sha256 == b.first_batch_sha256


@pytest.mark.slow
def test_runs_by_other_code_are_shown_and_trained_again_on_demand(
    planned: list[PlannedRun],
) -> None:
    executor = InProcess()
    run_experiment(planned, executor, Watcher())
    forget_checksums(planned[0].folder)
    environment = planned[0].folder / "environment.json"
    values = json.loads(environment.read_text()) | {"code_sha256": "other"}
    environment.write_text(json.dumps(values))
    watcher = Watcher()
    run_experiment(planned, executor, watcher)
    assert "by another version of the code" in watcher.lines[0]
    assert len(executor.jobs) == 2
    run_experiment(planned, executor, Watcher(), fresh=True)
    assert len(executor.jobs) == 4
    aside = planned[0].folder.with_name(planned[0].folder.name + ".old1")
    assert (aside / "summary.json").exists()  # set aside, not deleted


@pytest.mark.slow
def test_what_fails_diverges_or_runs_out_of_memory_is_kept_and_the_others_go_on(
    experiment: Experiment, dataset: Dataset, tmp_path: Path
) -> None:
    planned = plan_runs(experiment, dataset, tmp_path / "runs")
    outcomes = iter([Outcome("failed", "a bug"), Outcome("out of memory", "no room")])
    executor = InProcess(lambda job: next(outcomes, None) or perform_quietly(job))
    watcher = Watcher()
    states = run_experiment(planned, executor, watcher)
    assert states == ["failed", "finished", "finished", "finished"]
    assert [job.config.batch_size for job in executor.jobs] == [4, 4, 2, 4, 4]
    assert "micro-batches of 2 sequences, 2 of them an iteration" in "".join(watcher.lines)
    assert run_state(planned[0].folder) == ("failed", "failed: a bug")
    # The run that was cut finer is the run that was asked for, and says how it was cut.
    assert RunFolder(planned[1].folder).read_config().batch_size == 2
    # What failed is tried again.
    assert run_experiment(planned, InProcess(), Watcher())[0] == "finished"


@pytest.mark.slow
def test_a_learning_rate_that_explodes_is_a_result(dataset: Dataset, tmp_path: Path) -> None:
    text = TEN_LINES.format(config=TINY_CONFIG + "grad_clip = 0.0\n")
    text = text.replace("learning_rate = 1e-2", "learning_rate = 1e30")
    experiment = load_experiment(write(tmp_path / "wild.toml", text))
    planned = plan_runs(experiment, dataset, tmp_path / "runs", seeds=(1,))
    states = run_experiment(planned, LocalExecutor(), Watcher())
    assert states == ["finished", "diverged"]
    record = write_record(experiment, dataset, planned, tmp_path / "runs")
    (comparison,) = load_outcome(record).comparisons
    assert comparison.verdict == "diverged"
    assert "high, seed 1: diverged" in comparison.failures[0]


def test_running_out_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert out_of_memory(caught.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert not out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.slow
def test_an_experiment_that_is_stopped_goes_on_in_the_middle_of_its_run(
    dataset: Dataset, tmp_path: Path
) -> None:
    """SIGTERM to the experiment saves the run at hand; the same command ends with the same bits."""
    config = TINY_CONFIG.replace("max_iters = 6", "max_iters = 400")
    path = write(tmp_path / "long.toml", TEN_LINES.format(config=config))
    command = [sys.executable, "-m", "storylab", "experiment", "run", str(path), "--seeds", "1"]
    command += ["--data_dir", str(dataset.folder), "--only", "low"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(runs: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, "--runs", runs],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def metrics(runs: str) -> list[Row]:
        (folder,) = (tmp_path / runs).glob("nano-*")
        return RunFolder(folder).read_rows()

    first = start("stopped")
    deadline = time.time() + 120
    while time.time() < deadline:
        if (
            list((tmp_path / "stopped").glob("nano-*/metrics.jsonl"))
            and len(metrics("stopped")) > 5
        ):
            break
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM, err
    assert "goes on from there" in err
    assert len(metrics("stopped")) < 400
    for runs in ("stopped", "whole"):
        again = start(runs)
        out, err = again.communicate(timeout=300)
        assert again.returncode == 0, err
        assert "EXPERIMENTS.md" in out
    losses = [
        [row.loss for row in metrics(runs) if isinstance(row, IterationRow)]
        for runs in ("stopped", "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 401


def calibrate(config: TrainConfig) -> dict[str, Any]:
    """The answer of a calibration in this process."""
    answer = perform_quietly(Job("measure", config)).answer
    assert answer is not None
    return answer


@pytest.mark.slow
def test_the_plan_is_shown_without_training(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.toml")
    args = ["experiment", "run", str(path), "--runs", str(tmp_path / "runs"), "--dry_run"]
    assert main([*args, "--data_dir", str(dataset.folder), "--only", "high"]) == 0
    out = capsys.readouterr().out
    assert "Plan: Two rates: 2 runs, about" in out and "predicted" in out and "448 tokens" in out
    assert not list((tmp_path / "runs").glob("nano-*"))
    assert main([*args, "--data_dir", str(dataset.folder), "--only", "highest"]) == 2


def test_a_calibration_foretells_memory_and_time(
    planned: list[PlannedRun], tiny_config: Callable[..., TrainConfig]
) -> None:
    measured = calibrate(planned[0].config)
    assert measured["micro_batch_seconds"] > 0 and measured["peak_memory_bytes"] > 1e7


@pytest.mark.parametrize("accumulation", [1, 2, 16])
def test_an_update_is_charged_once_an_iteration(
    planned: list[PlannedRun], monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """On a machine where a micro-batch takes 100 s and an update 300 s, by a clock of our own."""
    config = dataclasses.replace(planned[0].cell.config, gradient_accumulation_steps=accumulation)
    run = dataclasses.replace(planned[0], cell=dataclasses.replace(planned[0].cell, config=config))

    def step(self: StepTimer, sequences: int, in_a_row: int = 1) -> float:
        return 100.0 * sequences / self.config.batch_size + 300.0

    monkeypatch.setattr(StepTimer, "step", step)
    ((_, estimate),) = estimate_runs([run], InProcess())
    assert estimate is not None
    # Beside it there are some real evaluation batches.
    expected = (config.max_iters + 1) * (accumulation * 100.0 + 300.0)
    assert estimate.seconds == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        ({"optimizer": "normuon"}, False),
        ({"ema_fraction": 0.1}, False),
        ({"dtype": "fp8", "backend": "emulated"}, False),
        ({"gradient_accumulation_steps": 2}, False),
        ({"batch_size": 2}, False),
        ({"model": ModelConfig(1, 1, 1, 16, 16, qk_norm=True)}, False),
        ({"learning_rate": 3e-3, "schedule": "linear", "max_iters": 8}, True),
        ({"weight_decay": 0.0, "eval_interval": 2, "data_seed": 7}, True),
    ],
    ids=str,
)
def test_only_runs_of_like_steps_share_a_calibration(
    planned: list[PlannedRun], change: dict[str, Any], alike: bool
) -> None:
    executor = InProcess(lambda job: Outcome("failed"))
    cell = planned[0].cell
    other = dataclasses.replace(cell, config=dataclasses.replace(cell.config, **change))
    runs = [planned[0], dataclasses.replace(planned[0], cell=other, seed=2)]
    assert len(list(estimate_runs(runs, executor))) == 2
    assert executor.actions == ["measure"] * (1 if alike else 2)


def test_a_calibration_that_fails_stops_nothing(
    experiment: Experiment, planned: list[PlannedRun]
) -> None:
    executor = InProcess(lambda job: Outcome("out of memory", "no room"))
    assert [estimate for _, estimate in estimate_runs(planned, executor)] == [None, None]
    estimates = estimated(planned, executor, ConsoleReporter())
    lines = list(plan_lines(experiment, estimates, executor.slots))
    assert "cannot be calibrated" in lines[1]


@pytest.mark.parametrize("others", [0.0, 1.5])
def test_a_plan_tells_of_programs_beside_its_calibrations(
    experiment: Experiment, planned: list[PlannedRun], others: float
) -> None:
    measured = dict.fromkeys(calibrate(planned[0].config), 1.0) | {"other_cores": others}
    executor = InProcess(lambda job: Outcome("done", answer=measured))
    estimates = estimated(planned, executor, ConsoleReporter())
    told = list(plan_lines(experiment, estimates, executor.slots))[-1]
    assert ("Other programs used up to 1.5 of" in told) == (others > 0)


def test_what_a_call_leaves_out_stays_in_the_record(
    experiment: Experiment, dataset: Dataset, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"

    def record(**options: Any) -> list[list[str]]:
        planned = plan_runs(experiment, dataset, runs, **options)
        path = write_record(experiment, dataset, planned, runs)
        assert load_outcome(path).comparisons  # it can be read, whatever it has
        return [sorted(cell["runs"]) for cell in json.loads(path.read_text())["cells"]]

    assert record(only=("high",), seeds=(1,)) == [[], ["1"]]
    assert record() == [["1", "2"], ["1", "2"]]
    assert record(seeds=(1,)) == [["1", "2"], ["1", "2"]]
    assert record(only=("low",), seeds=(1, 2, 3)) == [["1", "2", "3"], ["1", "2"]]


def test_an_arm_that_this_machine_cannot_run_is_named_and_can_be_left_out(
    dataset: Dataset, tmp_path: Path
) -> None:
    text = f"""
title = "Precision"
purpose = "?"
factor = "precision"
[config]
{TINY_CONFIG}
[arms]
bfloat16 = {{}}
hardware = {{ dtype = "nvfp4", backend = "te" }}
emulated = {{ dtype = "nvfp4", backend = "emulated" }}
"""
    experiment = load_experiment(write(tmp_path / "a.toml", text))
    with pytest.raises(UserError, match=r"arm 'hardware': --backend te needs.*--only"):
        plan_runs(experiment, dataset, tmp_path / "runs")
    planned = plan_runs(experiment, dataset, tmp_path / "runs", only=("bfloat16", "emulated"))
    assert {run.cell.arm for run in planned} == {"bfloat16", "emulated"}
    path = write_record(experiment, dataset, planned, tmp_path / "runs")
    runs = [len(cell["runs"]) for cell in json.loads(path.read_text())["cells"]]
    assert runs == [3, 0, 3]


@pytest.mark.slow
def test_a_damaged_run_is_set_aside_and_trained_again(planned: list[PlannedRun]) -> None:
    run_experiment(planned, InProcess(), Watcher())
    (planned[0].folder / "metrics.jsonl").write_text("")
    assert planned[0].read_state() == "damaged"
    watcher = Watcher()
    assert run_experiment(planned, InProcess(), watcher) == ["finished", "finished"]
    assert "metrics.jsonl has been altered" in watcher.lines[0]
    assert "), set aside as" in watcher.lines[0]


def test_a_run_that_is_closed_to_us_is_left_where_it_is(
    planned: list[PlannedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be whole, so it is not trained again, and the other run goes on."""
    executor = InProcess()
    run_experiment(planned[:1], executor, Watcher())
    closed = planned[0].folder / "metrics.jsonl"
    closed.write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed)
    watcher = Watcher()
    assert run_experiment(planned, executor, watcher) == ["failed", "finished"]
    assert watcher.lines[0].endswith(f"failed: cannot read {closed}: Permission denied")
    assert executor.actions == ["train", "train"] and closed.exists()


def test_a_run_that_is_no_folder_is_set_aside(planned: list[PlannedRun]) -> None:
    planned[0].folder.parent.mkdir()
    planned[0].folder.write_text("mine")
    assert planned[0].read_state() == "damaged"
    assert run_experiment(planned[:1], InProcess(), Watcher()) == ["finished"]
    aside = planned[0].folder.with_name(planned[0].folder.name + ".old1")
    assert aside.read_text() == "mine"


@pytest.mark.slow
def test_a_killed_run_goes_on_once_before_its_micro_batch_is_halved(
    planned: list[PlannedRun],
) -> None:
    def answer(job: Job) -> Outcome:
        outcome = perform_quietly(job)
        if len(executor.jobs) < 3:
            (planned[0].folder / SUMMARY).unlink()
            return Outcome("killed", "killed")
        return outcome

    executor = InProcess(answer)
    run_experiment(planned[:1], executor, Watcher())
    assert [job.config.batch_size for job in executor.jobs] == [4, 4, 2]
    assert (planned[0].folder / MICROBATCH_NOTE).exists()


@contextmanager
def elsewhere(run: PlannedRun) -> Iterator[None]:
    """Another process holds the run's name for three seconds."""
    lock = lease_folder(run.folder)
    lock.mkdir(parents=True, exist_ok=True)
    script = (
        "import fcntl, os, sys, time; f = os.open(sys.argv[1], os.O_RDONLY); "
        "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(3)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        yield


@pytest.mark.slow
def test_two_experiments_do_not_train_a_run_twice(planned: list[PlannedRun]) -> None:
    """While another process holds the run's name, this one waits, then takes what came of it."""
    executor = InProcess()
    run_experiment(planned[:1], executor, Watcher())
    with elsewhere(planned[0]):
        watcher = Watcher()
        assert run_experiment(planned[:1], executor, watcher) == ["finished"]
    assert "waiting for that" in watcher.lines[0] and "trained before" in watcher.lines[1]
    assert executor.actions == ["train"]


@pytest.mark.slow
def test_what_another_process_trains_comes_last(planned: list[PlannedRun]) -> None:
    """So that two processes on one experiment share its runs instead of waiting in step."""
    with elsewhere(planned[0]):
        watcher = Watcher()
        assert run_experiment(planned, InProcess(), watcher) == ["finished", "finished"]
    told = [line.partition("]")[0] for line in watcher.lines]
    assert told[0] == "[2/2" and told[-1] == "[1/2"
