"""The checks before the first step, run together: they change no bit, are recorded, and stop a run."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from record_folders import forget_checksums
from samples import TINY, MakeConfig
from storylab.cli import main
from storylab.config import METHODS
from storylab.errors import UserError
from storylab.record.folder import RunFolder, open_run
from storylab.record.run import load_run
from storylab.record.schema import Checks
from storylab.reporting.setup_facts import setup_facts
from storylab.training import checking
from storylab.training.check import Check, Finding, Subject
from storylab.training.observers import Observer
from storylab.training.resume import resume
from storylab.training.train import train

LOSSES = ("loss", "grad_norm", "learning_rate", "train_loss", "val_loss")


def everything(run: RunFolder) -> dict[str, Any]:
    """All numbers of a run, and its tensors as bytes."""
    rows = [[getattr(row, name, None) for name in LOSSES] for row in run.read_rows()]
    summary = run.read_summary()
    assert summary is not None
    tensors = {
        (name, key): tensor.numpy().tobytes()
        for name in ("last", "best")
        for key, tensor in load_file(run.checkpoint(name)).items()
    }
    return {"rows": rows, "validation": summary.validation, "tensors": tensors,
            "samples": summary.samples}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "normuon"},
        {"model": dataclasses.replace(TINY, attention="window:5,full"), "dtype": "bfloat16"},
        {"dtype": "nvfp4", "backend": "emulated"},
        {"dtype": "fp8", "backend": "emulated", "min_lr": 0.0},
        METHODS["fast"] | {"model": dataclasses.replace(TINY, **METHODS["fast"]["model"])},
    ],
    ids=["adamw", "normuon", "window", "nvfp4", "fp8", "fast"],
)
def test_checks_change_no_bit_of_a_run(
    tiny_config: MakeConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    checked = train(tiny_config(out_dir=tmp_path / "checked", **changes))
    skipped = train(tiny_config(out_dir=tmp_path / "skipped", skip_checks=True, **changes))
    assert everything(checked) == everything(skipped)
    recorded = [run.read_environment().checks for run in (checked, skipped)]
    assert [checks.skipped for checks in recorded if isinstance(checks, Checks)] == [False, True]


@pytest.mark.slow
def test_random_numbers_go_on_where_they_were(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even after a check that draws some."""

    def draw(subject: Subject) -> Finding:
        return Finding(f"{random.random()} {np.random.rand()} {torch.rand(())}")

    drawn: list[list[float]] = []

    class Draws(Observer):
        def start(self, folder: Path) -> None:
            drawn.append([random.random(), np.random.rand(), float(torch.rand(()))])

    monkeypatch.setattr(checking, "CHECKS", (*checking.CHECKS, Check("dice", 99, draw)))
    config = tiny_config(max_iters=1)
    for skip in (False, True):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        out = config.out_dir / str(skip) if config.out_dir else None
        train(dataclasses.replace(config, skip_checks=skip, out_dir=out), Draws())
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_results_are_recorded_and_shown(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tiny_config(schedule="constant", warmup_iters=0))
    checks = run.read_environment().checks
    assert isinstance(checks, Checks) and not checks.skipped
    names = ["token ids", "text", "initial loss", "gradients", "causality", "optimizer"]
    assert [result.name for result in checks.results] == names
    assert all(result.passed and result.finding for result in checks.results)
    assert sum(result.seconds for result in checks.results) <= checks.seconds
    # Another machine may have other kernels; the data and the initial weights are the same.
    resume(run.folder, dataclasses.replace(run.read_config(), max_iters=9))
    resume(run.folder, dataclasses.replace(run.read_config(), max_iters=10, skip_checks=True))
    stages = [stage.checks for stage in run.read_environment().resumed]
    assert isinstance(stages[0], Checks) and isinstance(stages[1], Checks)
    assert [result.name for result in stages[0].results] == ["causality"]
    assert stages[1] == Checks(skipped=True, seconds=0.0)
    assert (run.folder / "log.txt").read_text().count("were skipped (--skip_checks)") == 1
    assert main(["info", str(run.folder)]) == 0
    text = capsys.readouterr().out
    assert "checks before iteration 0: " in text and "  causality          passed: " in text
    assert "checks before iteration 10: skipped (--skip_checks)" in text
    assert main(["info", str(run.folder), "--n_layer", "2"]) == 2
    assert "--n_layer is for a model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_fault_stops_before_anything_is_written(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "storylab.config.patterns.Full.allows", lambda self, query, key: key <= query + 1
    )
    config = tiny_config()
    assert config.out_dir is not None
    with pytest.raises(
        UserError, match=r"^check before the first step failed \(causality\): .*mask"
    ):
        train(config)
    assert not config.out_dir.exists()
    flags = [
        "--preset",
        "nano",
        "--data_dir",
        str(config.data_dir),
        "--out_dir",
        str(config.out_dir),
    ]
    assert main(["train", *flags, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "(causality)" in error
    train(dataclasses.replace(config, skip_checks=True, max_iters=1))


@pytest.mark.slow
def test_a_fault_of_this_machine_stops_a_resume_and_changes_nothing(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tiny_config(schedule="constant", warmup_iters=0))
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(
        "storylab.config.patterns.Full.allows", lambda self, query, key: key <= query + 1
    )
    with pytest.raises(UserError, match="causality"):
        resume(run.folder, dataclasses.replace(run.read_config(), max_iters=10))
    assert before == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}


def test_runs_of_versions_without_these_records_read(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tiny_config(max_iters=1))
    forget_checksums(run.folder)
    for name, key in (("environment.json", "checks"), ("config.json", "skip_checks")):
        path = run.folder / name
        values = json.loads(path.read_text())
        del values[key]
        path.write_text(json.dumps(values))
    assert load_run(run.folder).config.skip_checks is False
    assert main(["info", str(run.folder)]) == 0
    assert "checks before iteration 0: not recorded" in capsys.readouterr().out


def test_a_record_of_checks_is_read_strictly(tiny_config: MakeConfig) -> None:
    run = train(tiny_config(max_iters=1))
    path = run.folder / "environment.json"
    values = json.loads(path.read_text())
    values["checks"]["results"][0]["seconds"] = -1.0
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"environment.json.*checks.results"):
        open_run(run.folder).read_environment()


def test_names_and_places_of_checks_are_their_own() -> None:
    assert len({check.name for check in checking.CHECKS}) == len(checking.CHECKS) == 9
    assert len({check.position for check in checking.CHECKS}) == len(checking.CHECKS)


@pytest.mark.slow
def test_reports_name_runs_without_checks(tiny_config: MakeConfig, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("checked", "unchecked")]
    for out in outs:
        train(tiny_config(max_iters=1, out_dir=out, skip_checks=out.name == "unchecked"))
    outcome: Any = SimpleNamespace(runs=[load_run(out) for out in outs])
    assert dict(setup_facts([outcome]))["checks"] == "skipped in unchecked (--skip_checks)"
