"""Plans: against published speeds, by hand, and by what must hold of any prediction."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

import plan_check
from storylab.cli import main
from storylab.config import TrainConfig
from storylab.lab_cli import GpuName, SoftwareName
from storylab.model.flops import attention_flops, training_flops
from storylab.planning.calibrate import Measured
from storylab.planning.cards import CARDS, Card
from storylab.planning.roofline import (
    ATTENTION,
    LIMIT,
    SOFTWARE,
    gains,
    parts,
    tokens_per_second,
)
from storylab.planning.words import can_run
from storylab.precision.recipes import RECIPES, find_recipe

RECORD = TrainConfig()
VOCAB = 50257


@pytest.mark.parametrize("row", plan_check.PUBLISHED, ids=lambda row: f"{row.what} {row.dtype}")
def test_published_speeds_come_out(row: plan_check.Published) -> None:
    assert row.ratio == pytest.approx(1.0, abs=0.1)
    limit = dataclasses.replace(row, software=LIMIT)
    assert limit.predicted > row.high


def test_products_are_those_of_the_model() -> None:
    for recipe in (None, *RECIPES.values()):
        work = parts(RECORD, VOCAB, LIMIT, recipe)
        tokens = RECORD.batch_size * RECORD.block_size
        # The backward pass of attention makes its scores again.
        again = 0.5 * attention_flops(RECORD.model, RECORD.block_size)
        expected = training_flops(RECORD.model, VOCAB, RECORD.block_size) + again
        assert sum(part.flops for part in work) == pytest.approx(tokens * expected)


def test_no_software_is_faster_than_the_limit() -> None:
    for card in CARDS.values():
        for dtype in ("bfloat16", "fp8", "nvfp4"):
            recipe = find_recipe(dtype)
            if can_run(card, recipe):
                limit = tokens_per_second(RECORD, VOCAB, card, LIMIT, recipe)
                for software in SOFTWARE.values():
                    assert tokens_per_second(RECORD, VOCAB, card, software, recipe) < limit


def test_amdahls_law() -> None:
    """On a card whose memory costs nothing, by hand: what converts goes twice as fast."""
    card = Card("card", (8, 9), 100.0, 200.0, None, 1e9, 24, 300)
    work = parts(RECORD, VOCAB, LIMIT)
    whole = sum(part.flops for part in work)
    linear = next(part.flops for part in work if part.name == "linear layers")
    _, most = gains(RECORD, VOCAB, card, LIMIT, RECIPES["fp8"])
    assert most == pytest.approx(whole / (whole - linear / 2), rel=1e-4)
    assert ATTENTION in {part.name for part in work}


def test_the_hoped_for_gains_are_out_of_reach() -> None:
    """The record hoped for 2x from FP8 and 4x from NVFP4 on one RTX 5090."""
    for kind in (*SOFTWARE.values(), LIMIT):
        for dtype, hoped in (("fp8", 2.0), ("nvfp4", 4.0)):
            brings, most = gains(RECORD, VOCAB, CARDS["rtx5090"], kind, RECIPES[dtype])
            assert 1.0 < brings < most < hoped


def test_what_a_card_lacks_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "rtx4090", "a100", "--dtype", "mxfp8"]) == 0
    assert capsys.readouterr().out.count("cannot train in mxfp8") == 2
    assert main(["plan", "experiments/03-nvfp4.toml", "--scale", "record", "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16" in out and "H100 SXM cannot train in nvfp4" in out


def test_a_plan_shows_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    out = capsys.readouterr().out
    assert "112,934,400 parameters" in out and "RTX 5090" in out and "is predicted" in out
    for text in ("output head", "tok/s", "kWh", "FP8 can bring at most", "NVFP4 brings", "memory"):
        assert text in out
    assert main(["plan", "--batch_size", "2048"]) == 0
    assert "take a smaller batch" in capsys.readouterr().out


def test_this_machine_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storylab.planning.calibrate.SECONDS", 0.0)
    flags = "--gpu this --preset nano --batch_size 2 --block_size 16 --dtype nvfp4 --device cpu"
    assert main(["plan", *flags.split()]) == 0
    assert "this machine, from" in capsys.readouterr().out
    config = TrainConfig(max_iters=9, gradient_accumulation_steps=4)
    assert Measured(0.5, 1.0, 0.0).seconds(config) == pytest.approx(10 * (4 * 0.5 + 1.0))


def test_every_card_and_kind_of_software_has_a_flag() -> None:
    assert {*CARDS, "this"} == set(get_args(GpuName))
    assert set(SOFTWARE) == set(get_args(SoftwareName))


def test_an_experiment_is_calibrated_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiments/02-fp8.toml", "--gpu", "this"]) == 2
    assert "--dry_run" in capsys.readouterr().err
