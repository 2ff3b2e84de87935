"""Plans against published speeds."""

from __future__ import annotations

import pytest

import fused_traffic
import plan_check
from storylab.config import ModelConfig, TrainConfig
from storylab.config.model import ResidualDtype
from storylab.planning.gpus import GPUS, Gpu
from storylab.planning.roofline import (
    gains,
    micro_batch_seconds,
    micro_batch_work,
    tokens_per_second,
    waiting_seconds,
)
from storylab.planning.software import LIMIT, SOFTWARE, UNSEEN_RUNS
from storylab.precision.edit import find_recipe
from storylab.precision.recipes import RECIPES

RECORD = TrainConfig()
VOCAB = 50257


@pytest.mark.parametrize("row", plan_check.FITTED, ids=lambda row: f"{row.name} {row.dtype}")
def test_published_speeds_come_out(row: plan_check.Published) -> None:
    assert row.ratio() == pytest.approx(1.0, abs=0.1)
    recipe = find_recipe(row.dtype)
    assert tokens_per_second(row.config, row.vocab_size, row.gpu, LIMIT, recipe) > 1e3 * row.high


def test_a_figure_is_predicted_from_the_others() -> None:
    assert plan_check.held_out(plan_check.FITTED) == pytest.approx([1.0] * 6, abs=0.12)


def test_the_shares_in_use_are_those_of_the_fit() -> None:
    assert pytest.approx(plan_check.fit(plan_check.FITTED), rel=0.02) == plan_check.IN_USE


def test_a_plan_says_how_far_off_runs_are_that_it_was_not_fitted_to() -> None:
    measured = [1 / row.ratio() for row in plan_check.TESTS]
    assert pytest.approx((min(measured), max(measured)), abs=0.02) == UNSEEN_RUNS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
def test_fused_work_is_that_of_the_compilers_code(stream: ResidualDtype) -> None:
    shape = ModelConfig(1, 6, 6, 192, 256, residual_dtype=stream)
    counted = fused_traffic.counted_bytes(shape)
    assert fused_traffic.planned_bytes(shape) == pytest.approx(counted, rel=0.1)


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


def test_a_small_step_waits_for_the_host_and_a_large_one_does_not() -> None:
    """By hand: without a limit the GPU has nothing but gaps, which are shorter than launches."""
    software = SOFTWARE["eager"]
    free = Gpu("card", (9, 0), {"bfloat16": 1e9}, 1e9, 24, 300)
    work = micro_batch_work(RECORD, VOCAB, software)
    kernels = sum(each.kernels for each in work)
    waiting = waiting_seconds(work, free, software)
    assert waiting == pytest.approx(kernels * (software.launch - software.gap), rel=1e-3)
    assert micro_batch_seconds(work, free, software) == pytest.approx(kernels * software.launch)
    assert waiting_seconds(work, GPUS["rtx5090"], software) == 0


def test_cards_of_one_name_differ_in_their_products_alone() -> None:
    slow, fast = GPUS["rtx5090"].measured_cards() or pytest.fail("they differ by 30 %")
    times = {}
    for card in (slow, fast):
        work = micro_batch_work(RECORD, VOCAB, SOFTWARE["compiled"])
        times[card] = {each.name: each.seconds(card, SOFTWARE["compiled"]) for each in work}
    for name in times[slow]:
        ratio = times[slow][name] / times[fast][name]
        if name == "output head":
            assert ratio == pytest.approx(224 / 172, rel=0.01)
        elif name != "linear layers":
            assert ratio == 1
    assert GPUS["h100"].measured_cards() is None
