"""A resumed run has the bits of one that was never stopped."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import storylab
from finished_runs import InterruptAt, found, metrics, weights
from record_folders import forget_checksums
from samples import MakeConfig
from storylab.config import FORMER_NAMES
from storylab.data.dataset import Dataset
from storylab.data.prepare import PrepareConfig
from storylab.errors import Interrupted, UserError
from storylab.record import checkpoint
from storylab.record.folder import open_run
from storylab.training.observers import Observer
from storylab.training.resume import resume
from storylab.training.sampling import load_story_model
from storylab.training.train import train


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [1, 4, 6, 9])
def test_a_stopped_run_resumes_to_the_same_bits(
    tiny_config: MakeConfig, tmp_path: Path, at: int, number: signal.Signals
) -> None:
    whole = train(tiny_config(out_dir=tmp_path / "whole"))
    config = tiny_config(out_dir=tmp_path / "stopped")
    with pytest.raises(Interrupted, match="storylab resume") as stop:
        train(config, InterruptAt(at, number))
    assert stop.value.signal_number == number
    assert open_run(config.out_dir).read_summary() is None
    run = resume(config.out_dir)
    assert weights(run) == weights(whole)
    assert metrics(run) == metrics(whole)
    run_summary, whole_summary = run.read_summary(), whole.read_summary()
    assert run_summary is not None and whole_summary is not None
    assert found(run).validation == found(whole).validation
    assert found(run).best_val_loss == found(whole).best_val_loss
    assert found(run).samples == found(whole).samples
    assert run.read_environment().resumed[0].iteration == at


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon"},
        {"optimizer": "normuon"},
        {"ema_fraction": 0.5},
        {"ema_fraction": 0.2, "dtype": "mxfp8"},
    ],
    ids=str,
)
def test_a_run_with_other_parts_resumes_to_the_same_bits(
    tiny_config: MakeConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = train(tiny_config(**changes, out_dir=tmp_path / "whole"))
    config = tiny_config(**changes, out_dir=tmp_path / "stopped")
    with pytest.raises(Interrupted):
        train(config, InterruptAt(4, signal.SIGTERM))
    run = resume(config.out_dir)
    assert weights(run) == weights(whole)
    assert metrics(run) == metrics(whole)


@pytest.mark.slow
def test_a_run_of_former_field_names_resumes_to_the_same_bits(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"optimizer": "muon", "muon_lr": 0.03, "ema_fraction": 0.5}
    whole = train(tiny_config(**changes, out_dir=tmp_path / "whole"))
    config = tiny_config(**changes, out_dir=tmp_path / "stopped")
    with pytest.raises(Interrupted):
        train(config, InterruptAt(4, signal.SIGTERM))
    forget_checksums(config.out_dir)
    file = config.out_dir / "config.json"
    current = file.read_text()
    earlier = current
    for former, name in FORMER_NAMES.items():
        earlier = earlier.replace(f'"{name}"', f'"{former}"')
    assert earlier != current
    file.write_text(earlier)
    run = resume(config.out_dir, config)
    assert weights(run) == weights(whole)
    assert metrics(run) == metrics(whole)
    assert json.loads(file.read_text()) == json.loads(current)


@pytest.mark.slow
def test_a_run_with_a_share_of_it_cannot_be_made_longer(tiny_config: MakeConfig) -> None:
    config = tiny_config(schedule="constant", ema_fraction=0.5)
    train(config)
    with pytest.raises(UserError, match=r"moves .*ema_fraction.*start a new run"):
        resume(config.out_dir, dataclasses.replace(config, max_iters=12))


@pytest.mark.slow
def test_an_average_that_a_checkpoint_lacks_is_one_clear_line(tiny_config: MakeConfig) -> None:
    run = train(tiny_config(max_iters=3))
    forget_checksums(run.folder)
    file = run.folder / "config.json"
    text = file.read_text().replace('"ema_fraction": 0.0', '"ema_fraction": 0.5')
    assert text != file.read_text()
    file.write_text(text)
    with pytest.raises(UserError, match=r"ema_fraction .* has been altered"):
        resume(run.folder)


@pytest.mark.slow
def test_a_stop_between_an_evaluation_and_its_step_changes_nothing(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    class StopAtBest(Observer):
        def line(self, text: str) -> None:
            if text.startswith("Saved new best"):
                signal.raise_signal(signal.SIGTERM)

    whole = train(tiny_config(out_dir=tmp_path / "whole"))
    config = tiny_config(out_dir=tmp_path / "stopped")
    with pytest.raises(Interrupted, match="before iteration 4"):
        train(config, StopAtBest())
    run = resume(config.out_dir)
    assert metrics(run) == metrics(whole)
    assert weights(run) == weights(whole)


@pytest.mark.slow
def test_an_extended_run_that_is_killed_does_not_read_as_finished(
    tiny_config: MakeConfig,
) -> None:
    config = tiny_config(schedule="constant")
    run = train(config)
    longer = dataclasses.replace(run.read_config(), max_iters=12)

    class StopAtTheEnd(Observer):
        def progress(self, name: str, done: int, total: int) -> None:
            if (name, done) == ("training", 13):
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        resume(run.folder, longer, StopAtTheEnd())
    assert run.read_summary() is None
    assert not (run.folder / "story_losses.npy").exists()
    resumed = resume(run.folder)
    assert found(resumed).iterations == 13


@pytest.mark.slow
def test_a_float16_run_resumes_with_its_loss_scale(tiny_config: MakeConfig, tmp_path: Path) -> None:
    changes = {"dtype": "float16", "max_iters": 5}
    whole = train(tiny_config(out_dir=tmp_path / "whole", **changes))
    config = tiny_config(out_dir=tmp_path / "stopped", **changes)
    with pytest.raises(Interrupted):
        train(config, InterruptAt(3, signal.SIGTERM))
    _, state = checkpoint.load(open_run(config.out_dir).checkpoint("last"))
    assert state["scaler"]["scale"] > 1
    assert weights(resume(config.out_dir)) == weights(whole)


@pytest.mark.slow
def test_twenty_kills_leave_the_same_bits(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """SIGKILL at random moments, start-up and the writing of checkpoints among them."""
    changes = {"max_iters": 600, "eval_interval": 100, "checkpoint_minutes": 0.0}
    whole = train(tiny_config(out_dir=tmp_path / "whole", **changes))
    config = tiny_config(out_dir=tmp_path / "killed", **changes)
    script = (
        "import sys, torch; torch.set_num_threads(1); from pathlib import Path\n"
        "from storylab.training.resume import resume; resume(Path(sys.argv[1]))"
    )
    with pytest.raises(Interrupted):
        train(config, InterruptAt(1, signal.SIGTERM))
    rng = random.Random(0)
    kills, reached = 0, []
    while kills < 20:
        before = len(open_run(config.out_dir).read_rows())
        process = subprocess.Popen([sys.executable, "-c", script, str(config.out_dir)])
        # Wait for work to go on, so that most kills hit training and not the import of torch.
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and kills % 4:
            if len(open_run(config.out_dir).read_rows()) > before:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.12))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed 20 times"
        kills += 1
        reached.append(checkpoint.load(open_run(config.out_dir).checkpoint("last"))[1])
    iterations = [state["next_iteration"] for state in reached]
    assert iterations == sorted(iterations) and len(set(iterations)) > 5
    run = resume(config.out_dir)
    assert weights(run) == weights(whole)
    assert metrics(run) == metrics(whole)


def test_resuming_needs_the_same_config_and_data(
    tiny_config: MakeConfig, tmp_path: Path, dataset: Dataset
) -> None:
    config = tiny_config()
    with pytest.raises(Interrupted):
        train(config, InterruptAt(6, signal.SIGTERM))
    before = {p: p.read_bytes() for p in config.out_dir.rglob("*") if p.is_file()}
    other = dataclasses.replace(config, beta1=0.5)
    with pytest.raises(UserError, match=r"beta1 0\.9 -> 0\.5"):
        resume(config.out_dir, other)
    elsewhere = storylab.prepare(
        PrepareConfig(
            source="builtin", tokenizer="bpe:300", out=tmp_path / "d", builtin_stories=301
        )
    )
    moved = dataclasses.replace(config, data_dir=elsewhere.folder)
    with pytest.raises(UserError, match="fingerprint"):
        resume(config.out_dir, moved)
    longer = dataclasses.replace(config, max_iters=16)
    with pytest.raises(UserError, match="cosine"):
        resume(config.out_dir, longer)  # past the warm-up a cosine depends on its end
    assert {p: p.read_bytes() for p in config.out_dir.rglob("*") if p.is_file()} == before


def test_a_run_goes_on_on_its_own_kind_of_device(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Also where this machine has a GPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tiny_config()
    with pytest.raises(Interrupted):
        train(config, InterruptAt(6, signal.SIGTERM))
    forget_checksums(config.out_dir)
    path = config.out_dir / "config.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    before = {p: p.read_bytes() for p in config.out_dir.rglob("*") if p.is_file()}
    for wanted in (None, config, dataclasses.replace(config, device="auto")):
        with pytest.raises(
            UserError, match=r"trained on device 'cuda'.*own kind of device"
        ) as caught:
            resume(config.out_dir, wanted)
        assert "storylab eval" in str(caught.value) and "--device" not in str(caught.value)
    assert {p: p.read_bytes() for p in config.out_dir.rglob("*") if p.is_file()} == before
    assert load_story_model(open_run(config.out_dir), device="cpu").sample("a", max_new_tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["warm-up", "constant"])
def test_a_run_can_be_extended_where_its_schedule_permits(
    tiny_config: MakeConfig, tmp_path: Path, schedule: str
) -> None:
    how = {"warmup_iters": 50} if schedule == "warm-up" else {"schedule": "constant"}
    short, long = (tiny_config(out_dir=tmp_path / str(n), max_iters=n, **how) for n in (8, 16))
    run = train(short)
    lines: list[str] = []

    class Listener(Observer):
        def line(self, text: str) -> None:
            lines.append(text)

    assert resume(short.out_dir, None, Listener()).folder == run.folder
    assert "finished" in lines[-1]
    extended = resume(
        short.out_dir, dataclasses.replace(run.read_config(), max_iters=16), Listener()
    )
    assert any("8 -> 16" in text for text in lines)
    assert weights(extended) == weights(train(long))
    assert extended.read_config().max_iters == 16


@pytest.mark.parametrize("file", ["metrics.jsonl", "checkpoints/last.safetensors"])
def test_a_run_that_has_lost_a_file_is_not_begun_again(tiny_config: MakeConfig, file: str) -> None:
    config = tiny_config()
    with pytest.raises(Interrupted):
        train(config, InterruptAt(6, signal.SIGTERM))
    (config.out_dir / file).unlink()
    (config.out_dir / "checkpoints/previous.safetensors").unlink()
    with pytest.raises(UserError, match=file.split("/")[-1]):
        resume(config.out_dir)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before_it(
    tiny_config: MakeConfig, tmp_path: Path, damage: str
) -> None:
    """Evaluations, with a checkpoint after each, come before iterations 4 and 8."""
    straight = train(tiny_config(out_dir=tmp_path / "straight", max_iters=12))
    config = tiny_config(max_iters=12)
    with pytest.raises(Interrupted):
        train(config, InterruptAt(10, signal.SIGTERM))
    last, previous = (open_run(config.out_dir).checkpoint(n) for n in ("last", "previous"))
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    match damage:
        case "flip":
            last.write_bytes(data)
        case "truncate":
            last.write_bytes(data[:-100])
        case "delete":
            last.unlink()
    with pytest.raises(UserError, match=r"last\.safetensors"):
        load_story_model(open_run(config.out_dir))
    lines: list[str] = []

    class Lines(Observer):
        def line(self, text: str) -> None:
            lines.append(text)

    resumed = resume(config.out_dir, None, Lines())
    (said,) = [line for line in lines if "last.safetensors" in line]
    assert said.endswith("going on from the checkpoint before it, of iteration 9")
    assert weights(resumed) == weights(straight) and metrics(resumed) == metrics(straight)
    assert not previous.exists()


def test_two_damaged_checkpoints_are_one_clear_line(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    with pytest.raises(Interrupted):
        train(config, InterruptAt(6, signal.SIGTERM))
    for name in ("last", "previous"):
        open_run(config.out_dir).checkpoint(name).write_bytes(b"junk")
    with pytest.raises(UserError, match=r"last\.safetensors is not a whole.*previous\.safetensors"):
        resume(config.out_dir)


@pytest.mark.slow
def test_rows_that_have_changed_since_the_checkpoint_are_refused(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    with pytest.raises(Interrupted):
        train(config, InterruptAt(6, signal.SIGTERM))
    path = config.out_dir / "metrics.jsonl"
    data = path.read_bytes()
    changed = data.replace(b'"grad_norm": 0', b'"grad_norm": 1', 1)
    assert changed != data
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"metrics\.jsonl has been altered"):
        resume(config.out_dir)
    path.write_bytes(data)
    resume(config.out_dir)
