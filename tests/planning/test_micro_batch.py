"""Micro-batches by a GPU's free memory: the tokens of an iteration stay, and a run resumes with its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from samples import MakeConfig
from storylab.cli import main
from storylab.config import PRESETS, PresetName, TrainConfig, preset_config
from storylab.planning.micro_batch import fitted
from storylab.planning.roofline import memory_bytes
from storylab.training.train import train

CUDA = torch.device("cuda")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("free", [1e8, 4e9, 12e9, 24e9, 80e9])
def test_the_longest_micro_batch_that_fits(preset: PresetName, free: float) -> None:
    config = preset_config(preset)
    found, vocab_size = fitted(config, free), PRESETS[preset].vocab_size
    assert found.tokens_per_iteration == config.tokens_per_iteration
    same = dataclasses.replace(
        found,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    assert same == config
    if found.batch_size > 1:
        assert memory_bytes(found, vocab_size) < free
    if found.gradient_accumulation_steps > 1 and found.batch_size * found.block_size < 2**16:
        twice = dataclasses.replace(found, batch_size=2 * found.batch_size)
        assert memory_bytes(twice, vocab_size) > free / 2


def test_sizes_for_known_cards() -> None:
    assert [fitted(TrainConfig(), free).batch_size for free in (8e9, 24e9, 79e9)] == [32, 128, 512]
    odd = TrainConfig(batch_size=3, gradient_accumulation_steps=5)
    assert [fitted(odd, free).batch_size for free in (80e9, 3.6e9)] == [15, 1]
    assert fitted(TrainConfig(dtype="nvfp4"), 80e9) == TrainConfig(dtype="nvfp4")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("", (512, 2)), ("--batch_size 64", (64, 16)), ("--gradient_accumulation_steps=16", (64, 16))],
)
def test_flags_decide_before_memory_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, expected: tuple[int, int]
) -> None:
    trained = Mock(return_value=Mock(folder=tmp_path))
    # A machine with a GPU, which nothing here has.
    monkeypatch.setattr("storylab.training.train.train", trained)
    monkeypatch.setattr("storylab.training.precision.choose_device", lambda name: CUDA)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79e9, 80e9))
    assert main(["train", "--data_dir", str(tmp_path), *flags.split()]) == 0
    config = trained.call_args.args[0]
    assert (config.batch_size, config.gradient_accumulation_steps) == expected


@pytest.mark.slow
def test_a_run_resumes_with_its_own_micro_batches(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU that chose them: the same command without flags for them, and --resume."""
    config = tiny_config(batch_size=512, gradient_accumulation_steps=2)
    resumed = Mock(return_value=Mock(folder=config.out_dir))
    monkeypatch.setattr("storylab.training.resume.resume", resumed)
    train(dataclasses.replace(config, max_iters=0))
    for flags, expected in (("", (512, 2)), ("--batch_size 64", (64, 16))):
        assert main(["train", "--resume", "--out_dir", str(config.out_dir), *flags.split()]) == 0
        wanted = resumed.call_args.args[1]
        assert (wanted.batch_size, wanted.gradient_accumulation_steps) == expected
