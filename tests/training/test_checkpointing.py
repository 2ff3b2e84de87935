"""Checkpoints: when they are written, what they hold, and damage to them."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from finished_runs import InterruptAt
from samples import TINY, MakeConfig
from stepping import VOCAB
from storylab.errors import Interrupted, UserError
from storylab.model.transformer import Transformer
from storylab.record import checkpoint
from storylab.record.folder import open_run
from storylab.training.resume import resume
from storylab.training.sampling import load_story_model
from storylab.training.train import train


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
def test_a_damaged_checkpoint_is_refused(tiny_config: MakeConfig, how: str) -> None:
    run = train(tiny_config())
    path = run.checkpoint("best")
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[-5] ^= 1
        path.write_bytes(data)
    with pytest.raises(UserError, match="best"):
        load_story_model(run, "best")
    assert load_story_model(run, "last").block_size == 16


def test_an_altered_progress_in_a_checkpoint_is_refused(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    with pytest.raises(Interrupted):
        train(config, InterruptAt(6, signal.SIGTERM))
    path = open_run(config.out_dir).checkpoint("last")
    data = path.read_bytes()
    changed = data.replace(b'\\"next_iteration\\": 6', b'\\"next_iteration\\": 5')
    assert changed != data
    path.write_bytes(changed)
    open_run(config.out_dir).checkpoint("previous").unlink()
    with pytest.raises(UserError, match="altered"):
        resume(config.out_dir)


def test_a_checkpoint_holds_no_pickle_and_reads_elsewhere(tiny_config: MakeConfig) -> None:
    from safetensors.numpy import load_file

    run = train(tiny_config())
    plain = load_file(run.checkpoint("best"))
    model = Transformer(TINY, VOCAB)
    assert {n: v.shape for n, v in plain.items()} == {
        n: tuple(v.shape) for n, v in model.state_dict().items()
    }


def test_the_last_checkpoint_is_written_once(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, at both evaluations, and not again at the end, where nothing has changed since."""
    saved: list[tuple[str, int]] = []
    save = checkpoint.save

    def counted(path: Path, tensors: Any, state: dict[str, Any], previous: Path | None) -> None:
        if path.stem == "last":
            saved.append((path.stem, state["next_iteration"]))
        save(path, tensors, state, previous)

    # A file that is written twice looks like one that is written once.
    monkeypatch.setattr(checkpoint, "save", counted)
    train(tiny_config(max_iters=8, eval_interval=4))
    assert saved == [("last", 0), ("last", 5), ("last", 9)]
