"""Runs that skip or rewind where loss or gradients are not finite."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bad_batches import poisoned
from finished_runs import InterruptAt, found, metrics, weights
from samples import MakeConfig
from storylab.cli import main
from storylab.config import TrainConfig, recipe_digest, to_dict
from storylab.data.batches import TrainingBatches
from storylab.errors import Diverged, Interrupted
from storylab.experiments.compare import compare_runs
from storylab.experiments.verdicts import verdict_line
from storylab.model.transformer import Transformer
from storylab.record.folder import RunFolder, open_run
from storylab.record.run import load_run
from storylab.record.schema import IterationRow
from storylab.training import run_progress
from storylab.training.divergence import MOST_REWINDS, MOST_SKIPPED
from storylab.training.resume import resume
from storylab.training.train import train

Poison = Callable[..., None]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """Makes the loss of chosen batches not finite."""

    def set_up(*numbers: int, value: float = math.nan) -> None:
        make, forward = poisoned(numbers, value)
        monkeypatch.setattr(TrainingBatches, "__call__", make)
        monkeypatch.setattr(Transformer, "forward", forward)

    return set_up


def losses(run: RunFolder) -> list[float | None]:
    return [row.loss for row in run.read_rows() if isinstance(row, IterationRow)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_step_changes_no_weight_and_is_counted(
    tiny_config: MakeConfig, poison: Poison, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(3, value=value)
    with pytest.raises(Diverged):
        train(tiny_config(out_dir=tiny_config().out_dir.with_name("stop")))
    run = train(tiny_config(on_divergence="skip"))
    rows = [row for row in run.read_rows() if isinstance(row, IterationRow)]
    assert [row.iteration for row in rows] == list(range(9))
    assert [row.loss is None for row in rows] == [i == 3 for i in range(9)]
    assert rows[3].grad_norm is None and not rows[3].clipped
    summary = found(run)
    assert (summary.status, summary.skipped_steps, summary.rewinds) == ("finished", 1, [])
    assert "iteration 3: loss is" in (run.folder / "log.txt").read_text()
    assert main(["info", str(run.folder)]) == 0
    out = capsys.readouterr().out
    assert "divergence   skip" in out and "1 step skipped" in out


def test_a_skip_leaves_the_weights_of_the_step_before(
    tiny_config: MakeConfig, poison: Poison, tmp_path: Path
) -> None:
    """The last step is bad: the run ends with the weights of a run that is stopped before it."""
    with pytest.raises(Interrupted):
        train(tiny_config(out_dir=tmp_path / "stopped"), InterruptAt(8, signal.SIGTERM))
    poison(8)
    assert weights(train(tiny_config(on_divergence="skip"))) == weights(
        open_run(tmp_path / "stopped")
    )


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "rewind"])
@pytest.mark.parametrize(
    ("changes", "ahead"),
    [
        ({}, False),
        ({}, True),
        ({"dtype": "float16"}, False),
        ({"ema_fraction": 0.5}, True),
        ({"optimizer": "muon", "dtype": "fp8"}, False),
    ],
    ids=str,
)
def test_a_run_that_recovers_resumes_to_the_same_bits(
    tiny_config: MakeConfig,
    poison: Poison,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    policy: str,
    ahead: bool,
) -> None:
    """Stopped before and after the fault, with checkpoints by the clock, and as on a GPU."""
    poison(6)
    monkeypatch.setattr(run_progress, "runs_ahead", lambda device: ahead)
    more = changes | {"on_divergence": policy, "max_iters": 9}
    whole = train(tiny_config(out_dir=tmp_path / "whole", **more))
    assert found(whole).skipped_steps + len(found(whole).rewinds) == 1
    for at in (5, 8):
        config = tiny_config(out_dir=tmp_path / f"at-{at}", checkpoint_minutes=0.0, **more)
        with pytest.raises(Interrupted):
            train(config, InterruptAt(at, signal.SIGTERM))
        run = resume(config.out_dir)
        assert metrics(run) == metrics(whole) and weights(run) == weights(whole)
        assert found(run).rewinds == found(whole).rewinds
        assert found(run).skipped_steps == found(whole).skipped_steps


def test_a_rewind_goes_on_from_the_last_evaluation_with_later_data(
    tiny_config: MakeConfig, poison: Poison, tmp_path: Path
) -> None:
    """Its bits are those of a run that reads these batches from the start."""
    poison(6)
    run = train(tiny_config(on_divergence="rewind", out_dir=tmp_path / "rewound"))
    (rewind,) = found(run).rewinds
    assert (rewind.iteration, rewind.back_to, rewind.batches) == (6, 4, 3)
    assert "loss is nan" in rewind.reason
    assert not run.checkpoint("rewind").exists() and not run.checkpoint("previous").exists()
    make = TrainingBatches.__call__
    with pytest.MonkeyPatch.context() as patch:
        # The batches that the rewound run has kept.
        patch.setattr(TrainingBatches, "__call__", lambda b, n: make(b, n if n < 4 else n + 3))
        plain = train(tiny_config(out_dir=tmp_path / "plain"))
    assert metrics(run) == metrics(plain) and weights(run) == weights(plain)
    assert found(run).validation == found(plain).validation
    assert main(["verify", str(run.folder)]) == 0


def test_a_rewind_to_the_start_forgets_the_optimizer(
    tiny_config: MakeConfig, poison: Poison, tmp_path: Path
) -> None:
    poison(2)
    run = train(tiny_config(on_divergence="rewind", out_dir=tmp_path / "rewound", optimizer="muon"))
    assert found(run).rewinds[0].back_to == 0
    make = TrainingBatches.__call__
    with pytest.MonkeyPatch.context() as patch:
        # The batches that the rewound run has kept.
        patch.setattr(TrainingBatches, "__call__", lambda b, n: make(b, n + 3))
        plain = train(tiny_config(out_dir=tmp_path / "plain", optimizer="muon"))
    assert metrics(run) == metrics(plain) and weights(run) == weights(plain)


@pytest.mark.parametrize(("policy", "most"), [("skip", MOST_SKIPPED), ("rewind", MOST_REWINDS)])
def test_a_run_that_nothing_helps_diverges(
    tiny_config: MakeConfig, poison: Poison, policy: str, most: int
) -> None:
    poison(*range(5, 200))
    with pytest.raises(Diverged, match="loss is nan"):
        train(tiny_config(on_divergence=policy, max_iters=40, eval_interval=40))
    run = open_run(tiny_config().out_dir)
    summary = found(run)
    assert summary.status == "diverged"
    assert (summary.skipped_steps or len(summary.rewinds)) == most
    assert load_run(run.folder).recoveries == most
    assert main(["verify", str(run.folder)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_learning_rate_that_explodes_ends_as_diverged(
    tiny_config: MakeConfig, policy: str
) -> None:
    with pytest.raises(Diverged):
        train(
            tiny_config(
                learning_rate=1e30,
                grad_clip=0.0,
                warmup_iters=0,
                max_iters=20,
                on_divergence=policy,
            )
        )


@pytest.mark.slow
def test_a_verdict_says_which_arm_recovered(
    tiny_config: MakeConfig, poison: Poison, tmp_path: Path
) -> None:
    plain = train(tiny_config(out_dir=tmp_path / "plain", on_divergence="skip"))
    poison(3)
    other = train(tiny_config(out_dir=tmp_path / "other", beta1=0.8, on_divergence="skip"))
    (comparison,) = compare_runs([load_run(plain.folder), load_run(other.folder)])
    line = verdict_line(comparison)
    assert "1 of 1 runs of other" in line and "skipped 1 steps" in line


def test_the_default_keeps_every_digest(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    assert config.on_divergence == "stop"
    skip = tiny_config(on_divergence="skip")
    assert recipe_digest(config, "f") != recipe_digest(skip, "f")
    values = to_dict(config)
    del values["on_divergence"]
    assert TrainConfig(**{**config.__dict__}) == config and "on_divergence" not in values
