"""Plans against published speeds."""

from __future__ import annotations

import dataclasses

import pytest

import plan_check
from storylab.config import TrainConfig
from storylab.planning.gpus import GPUS, Gpu
from storylab.planning.roofline import (
    gains,
    micro_batch_work,
)
from storylab.planning.software import LIMIT, SOFTWARE
from storylab.precision.recipes import RECIPES

RECORD = TrainConfig()
VOCAB = 50257


@pytest.mark.parametrize("row", plan_check.PUBLISHED, ids=lambda row: f"{row.what} {row.dtype}")
def test_published_speeds_come_out(row: plan_check.Published) -> None:
    assert row.ratio == pytest.approx(1.0, abs=0.1)
    limit = dataclasses.replace(row, software=LIMIT)
    assert limit.predicted > row.high


def test_amdahls_law() -> None:
    """On a card whose memory costs nothing, by hand: what converts goes twice as fast."""
    gpu = Gpu("card", (8, 9), {"bfloat16": 100.0, "fp8": 200.0}, 1e9, 24, 300)
    work = micro_batch_work(RECORD, VOCAB, LIMIT)
    whole = sum(part.flops for part in work)
    linear = next(part.flops for part in work if part.name == "linear layers")
    _, most = gains(RECORD, VOCAB, gpu, LIMIT, RECIPES["fp8"])
    assert most == pytest.approx(whole / (whole - linear / 2), rel=1e-4)


def test_the_hoped_for_gains_are_out_of_reach() -> None:
    """The record hoped for 2x from FP8 and 4x from NVFP4 on one RTX 5090."""
    for kind in (*SOFTWARE.values(), LIMIT):
        for dtype, hoped in (("fp8", 2.0), ("nvfp4", 4.0)):
            brings, most = gains(RECORD, VOCAB, GPUS["rtx5090"], kind, RECIPES[dtype])
            assert 1.0 < brings < most < hoped
