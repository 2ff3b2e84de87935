"""Checkpoints: when they are written, what they hold, and damage to them."""

from __future__ import annotations

import random
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_checkpoint_holds_no_pickle_and_reads_elsewhere(tiny_config: MakeConfig) -> None:
    from safetensors.numpy import load_file

    run = train(tiny_config())
    plain = load_file(run.checkpoint("best"))
    model = Transformer(TINY, VOCAB)
    assert {n: v.shape for n, v in plain.items()} == {
        n: tuple(v.shape) for n, v in model.state_dict().items()
    }


@pytest.mark.slow
def test_the_last_checkpoint_is_written_once(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, at both evaluations, and not again at the end, where nothing has changed since."""
    saved: list[tuple[str, int]] = []
    save = checkpoint.save

    def counted(path: Path, tensors: Any, state: dict[str, Any], *others: Path | None) -> None:
        if path.stem == "last":
            saved.append((path.stem, state["next_iteration"]))
        save(path, tensors, state, *others)

    # A file that is written twice looks like one that is written once.
    monkeypatch.setattr(checkpoint, "save", counted)
    train(tiny_config(max_iters=8, eval_interval=4))
    assert saved == [("last", 0), ("last", 5), ("last", 9)]


@pytest.mark.slow
def test_every_changed_byte_of_a_checkpoint_is_found_when_it_is_read(
    tiny_config: MakeConfig,
) -> None:
    """All of the header's ends, and places all over the file."""
    path = train(tiny_config(max_iters=3)).checkpoint("last")
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(1)
    places = {
        *range(24),
        *range(header - 24, header + 4),
        *(draw.randrange(header) for _ in range(200)),
    }
    places |= {draw.randrange(header, len(data)) for _ in range(100)}
    for place in sorted(places):
        # White space at the end of the header is white space still.
        for value in {draw.randrange(256), ord("\t")} - {data[place]}:
            path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
            with pytest.raises(UserError, match=r"last\.safetensors"):
                checkpoint.load(path)
    path.write_bytes(data)
    checkpoint.load(path)
