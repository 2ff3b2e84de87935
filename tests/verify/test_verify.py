"""`storylab verify`: every changed byte is found and named, and so are changes with fitting checksums."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from executors import InProcess
from finished_runs import InterruptAt
from record_folders import forget_checksums
from samples import SMALL_EXPERIMENT, TINY
from storylab.checksums import CHECKSUMS, add_checksums, read_checksums
from storylab.cli import main
from storylab.config import TrainConfig
from storylab.data.dataset import Dataset, load_dataset
from storylab.errors import Interrupted, UserError
from storylab.record.folder import METRICS, RunFolder
from storylab.record.run import load_run
from storylab.record.stages import files_of
from storylab.reporting import report as reporting
from storylab.training.train import train
from storylab.verify.checks import DATA_CHECKS, EXPERIMENT_CHECKS, RUN_CHECKS
from storylab.verify.findings import Depth
from storylab.verify.verify import Verified, Verifier


def config_in(root: Path, name: str, data: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": TINY,
        "data_dir": data,
        "out_dir": root / "runs" / name,
        "dtype": "float32",
        "max_iters": 8,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "block_size": 16,
        "learning_rate": 1e-2,
        "warmup_iters": 2,
        "eval_interval": 3,
        "eval_iters": 1,
        "log_interval": 2,
        "device": "cpu",
    }
    return TrainConfig(**(values | changes))


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, a finished run and one that was stopped."""
    root = tmp_path_factory.mktemp("verify")
    shutil.copytree(dataset.folder, root / "data")
    train(config_in(root, "whole", root / "data"))
    with pytest.raises(Interrupted):
        train(config_in(root, "stopped", root / "data"), InterruptAt(6, signal.SIGTERM))
    return root


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy to change. Its runs name the data set of the original, which stays as it is."""
    shutil.copytree(trained, tmp_path / "place")
    return tmp_path / "place"


def verified(folder: Path, depth: Depth = "files") -> Verified:
    (found,) = Verifier(depth, None, None, lambda name, done, total: None)([folder])
    return found


def named(folder: Path, depth: Depth = "files") -> set[str]:
    """The files in which a difference was found."""
    return {difference.file for _, difference in verified(folder, depth).differences}


def test_what_is_whole_has_no_difference(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(trained / "runs" / "whole"), str(trained / "data")]
    assert main(["verify", *folders]) == 0
    out = capsys.readouterr().out
    assert "13 checks, no difference" in out and "not checked" not in out
    assert main(["verify", "--all", "--runs", str(trained / "runs"), "--data"]) == 0
    assert "3 verified at depth files: no differences" in capsys.readouterr().out


def flips(path: Path, count: int, end: int | None = None) -> list[tuple[int, int]]:
    """Places in a file, the first and the last byte among them, with another value for each."""
    data = path.read_bytes()[:end]
    draw = random.Random(path.name)
    places = {0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(count))}
    return [(at, data[at] ^ draw.randrange(1, 256)) for at in sorted(places)]


def test_every_changed_byte_of_a_run_is_found_and_named(place: Path) -> None:
    """Of every file, at some places; all of them are covered by the same sums."""
    folder = place / "runs" / "whole"
    tried = 0
    for name in [*files_of(folder), CHECKSUMS]:
        path = folder / name
        before = path.read_bytes()
        for at, value in flips(path, 12):
            path.write_bytes(before[:at] + bytes([value]) + before[at + 1 :])
            assert named(folder) >= {name}, (name, at, value)
            tried += 1
        path.write_bytes(before)
    assert tried > 150 and not named(folder)


def test_every_changed_byte_of_a_data_set_is_found_and_named(place: Path) -> None:
    folder = place / "data"
    for path in sorted(folder.iterdir()):
        before = path.read_bytes()
        for at, value in flips(path, 12):
            path.write_bytes(before[:at] + bytes([value]) + before[at + 1 :])
            assert path.name in named(folder), (path.name, at, value)
        path.write_bytes(before)
    assert not named(folder)


def test_every_changed_byte_of_a_run_under_way_is_found_up_to_its_checkpoint(place: Path) -> None:
    folder = place / "runs" / "stopped"
    assert not named(folder)
    for name in [*files_of(folder), CHECKSUMS]:
        path = folder / name
        before = path.read_bytes()
        for at, value in flips(path, 6):
            path.write_bytes(before[:at] + bytes([value]) + before[at + 1 :])
            assert name in named(folder), (name, at, value)
        path.write_bytes(before)
    RunFolder(folder).append(METRICS, "{")
    assert not named(folder)
    assert any("newer than the newest" in gap.reason for _, gap in verified(folder).gaps)


def test_a_changed_byte_is_found_where_the_file_is_used(place: Path) -> None:
    """Also one that leaves a file as readable as before."""
    for name, old, new in (
        ("config.json", b'"weight_decay": 0.1', b'"weight_decay": 0.2'),
        ("environment.json", b'"threads"', b'"threads" '),
        ("data.json", b"\n", b" "),
        ("summary.json", b'"other_cores"', b'"other_corez"'),
        ("metrics.jsonl", b'"data_seconds": 0', b'"data_seconds": 1'),
    ):
        path = place / "runs" / "whole" / name
        before = path.read_bytes()
        assert old in before, name
        path.write_bytes(before.replace(old, new, 1))
        with pytest.raises(UserError, match=f"{name} has been altered"):
            load_run(path.parent)
        path.write_bytes(before)
    manifest = place / "data" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"stories": ', b'"stories":1', 1))
    with pytest.raises(UserError, match=r"manifest\.json has been altered"):
        load_dataset(place / "data")


def test_a_file_that_is_missing_is_named(place: Path) -> None:
    folder = place / "runs" / "whole"
    (folder / "checkpoints" / "best.safetensors").unlink()
    (folder / "log.txt").unlink()
    assert named(folder) == {"checkpoints/best.safetensors", "log.txt"}


def test_other_programs_can_check_the_sums(place: Path) -> None:
    program = shutil.which("sha256sum")
    if program is None:
        pytest.skip("this machine has no sha256sum")
    for folder in (place / "runs" / "whole", place / "data"):
        command = [program, "--check", "--strict", CHECKSUMS]
        assert not subprocess.run(command, cwd=folder, capture_output=True).returncode
        listed = set(read_checksums(folder).sums)
        assert listed == {
            p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()
        } - {CHECKSUMS}


def test_runs_of_earlier_versions_are_verified_as_far_as_they_can_be(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_checksums(place)
    assert (
        main(["verify", str(place / "runs" / "whole"), str(place / "data"), "--depth", "files"])
        == 0
    )
    assert capsys.readouterr().out.count("there is no SHA256SUMS") == 2


def edited_rows(path: Path, kind: str, **values: Any) -> None:
    """Change values of the last row of a kind."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    next(row for row in reversed(rows) if row["kind"] == kind).update(values)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=2) + "\n")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("metrics.jsonl", lambda path: edited_rows(path, "iteration", learning_rate=1e-3)),
        ("metrics.jsonl", lambda path: edited_rows(path, "iteration", tokens=1)),
        ("metrics.jsonl", lambda path: edited_rows(path, "iteration", tokens_per_second=1e6)),
        ("metrics.jsonl", lambda path: edited_rows(path, "iteration", clipped=True, grad_norm=0.1)),
        ("metrics.jsonl", lambda path: edited_rows(path, "evaluation", best=False)),
        (
            "summary.json",
            lambda path: edited_rows(path.with_name(METRICS), "evaluation", val_loss=1.0),
        ),
        (
            "summary.json",
            lambda path: edited(path, lambda s: s["validation"].update(perplexity=2.0)),
        ),
        (
            "summary.json",
            lambda path: edited(path, lambda s: s["validation"].update(bits_per_byte=0.5)),
        ),
        ("summary.json", lambda path: edited(path, lambda s: s["test"].update(standard_error=0.1))),
        ("summary.json", lambda path: edited(path, lambda s: s.update(best_val_loss=1.0))),
        ("summary.json", lambda path: edited(path, lambda s: s.update(parameters=1))),
        (
            "summary.json",
            lambda path: edited(path, lambda s: s.update(median_tokens_per_second=1e6)),
        ),
        ("data.json", lambda path: edited(path, lambda d: d["tokens"].update(train=10**6))),
    ],
)
def test_changes_with_fitting_checksums_are_found_by_the_numbers(
    place: Path, file: str, change: Callable[[Path], None]
) -> None:
    folder = place / "runs" / "whole"
    change(folder / file)
    add_checksums(folder, files_of(folder))
    assert file in named(folder, "record")


def better(folder: Path) -> None:
    """Give a run a final validation loss that is a tenth of a nat lower, everywhere in its record."""
    losses = np.load(folder / "story_losses.npy")
    losses[:, 0] -= 0.1 * losses[:, 1]
    np.save(folder / "story_losses.npy", losses)
    ratio = losses[:, 0].sum() / losses[:, 1].sum()

    def change(summary: dict[str, Any]) -> None:
        found = summary["validation"]
        found["bits_per_byte"] *= ratio / found["loss"]
        found["loss"], found["perplexity"] = ratio, math.exp(ratio)

    edited(folder / "summary.json", change)
    add_checksums(folder, files_of(folder))


@pytest.mark.slow
def test_a_loss_that_the_weights_do_not_have_is_found(place: Path) -> None:
    folder = place / "runs" / "whole"
    better(folder)
    assert not named(folder, "files")  # the record agrees with itself
    found = verified(folder, "weights")
    messages = [difference.message for _, difference in found.differences]
    assert {check for check, _ in found.differences} == {"final loss"}
    assert any("validation loss" in message for message in messages)


@pytest.mark.parametrize(
    ("key", "value"), [("first_batch_sha256", "0" * 64), ("initial_weights_sha256", "0" * 64)]
)
def test_another_beginning_is_found(place: Path, key: str, value: str) -> None:
    folder = place / "runs" / "whole"
    edited(folder / "environment.json", lambda e: e.update({key: value}))
    add_checksums(folder, files_of(folder))
    assert named(folder, "weights") == {"environment.json"}


@pytest.mark.slow
def test_losses_of_another_machine_are_compared_up_to_rounding(place: Path) -> None:
    folder = place / "runs" / "whole"
    edited(folder / "environment.json", lambda e: e.update(processor="Abacus"))
    losses = np.load(folder / "story_losses.npy")
    losses[0, 0] += 1e-4
    np.save(folder / "story_losses.npy", losses)

    nats, tokens = losses.sum(axis=0)
    residuals = losses[:, 0] - nats / tokens * losses[:, 1]
    spread = math.sqrt(len(losses) / (len(losses) - 1) * (residuals**2).sum())

    def change(summary: dict[str, Any]) -> None:
        bits = (
            summary["validation"]["bits_per_byte"] * nats / tokens / summary["validation"]["loss"]
        )
        summary["validation"].update(
            loss=nats / tokens,
            perplexity=math.exp(nats / tokens),
            bits_per_byte=bits,
            standard_error=spread / tokens,
        )

    edited(folder / "summary.json", change)
    add_checksums(folder, files_of(folder))
    found = verified(folder, "weights")
    assert not found.differences
    assert any("another processor" in gap.reason for _, gap in found.gaps)
    better(folder)
    assert named(folder, "weights") == {"summary.json"}


@pytest.mark.slow
def test_an_experiment_is_verified_from_its_runs(
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Drawing takes seconds; no flag leaves figures out.
    monkeypatch.setattr(reporting, "_figures", lambda outcome: ())
    (tmp_path / "rates.toml").write_text(SMALL_EXPERIMENT.format(seeds="1, 2"))
    runs = tmp_path / "runs"
    args = ["--runs", str(runs), "--data_dir", str(dataset.folder)]
    assert main(["experiment", "run", str(tmp_path / "rates.toml"), *args], InProcess()) == 0
    every = ["verify", "--all", "--runs", str(runs), "--depth"]
    capsys.readouterr()
    assert main([*every, "weights"]) == 0, capsys.readouterr().out
    record, log = runs / "experiments/rates.json", runs / "report/EXPERIMENTS.md"
    before, text = record.read_bytes(), log.read_text()
    edited(record, lambda r: r["registered"]["plan"].update(margin=0.5))
    assert main([*every, "record"]) == 1
    assert "sha256 of the plan" in capsys.readouterr().out
    record.write_bytes(before)
    edited(
        record,
        lambda r: r.update(
            looks_taken=[{"time": "2026-01-01T00:00:00+0000", "seeds": 2, "settled": ["high"]}]
        ),
    )
    assert main([*every, "record"]) == 1
    assert "settled 'high'" in capsys.readouterr().out
    record.write_bytes(before)
    log.write_text(text.replace("- high vs low", "- low vs high"))
    assert log.read_text() != text
    assert main([*every, "record", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["differences"] == 1
    (found,) = [item for item in document["verified"] if item["kind"] == "experiment"]
    assert found["differences"][0]["check"] == "report"


def test_a_run_that_failed_before_it_began_has_no_difference(tmp_path: Path) -> None:
    failure = {"outcome": "failed", "reason": "no space", "started": "2026-01-01T00:00:00+0000"}
    (tmp_path / "failure.json").write_text(json.dumps(failure))
    found = verified(tmp_path, "weights")
    assert found.checks == ("bytes",) and not found.differences
    assert "failed before it began" in found.gaps[0][1].reason


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([str(tmp_path)], [], ["--all", str(tmp_path)], ["--all", "--runs", "nowhere"]):
        assert main(["verify", *args]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_guide_has_every_check() -> None:
    page = (Path(__file__).parents[2] / "docs/guide/verify.md").read_text(encoding="utf-8")
    for check in (*RUN_CHECKS, *DATA_CHECKS, *EXPERIMENT_CHECKS):
        assert f"| {check.name} | {check.recomputes} | {check.files} |" in page
    assert all(f"| {c.files} | `{c.depth}` |" in page for c in RUN_CHECKS)
