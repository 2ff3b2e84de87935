"""The text of a plan shows every part, next to its measurement."""

from __future__ import annotations

import dataclasses

import pytest

from storylab.cli import main
from storylab.config import TrainConfig
from storylab.model.cost import StepPart
from storylab.planning.bench import shares_line
from storylab.planning.gpus import GPUS
from storylab.planning.roofline import (
    micro_batch_work,
    predicted_shares,
)
from storylab.planning.software import SOFTWARE
from storylab.precision.recipes import RECIPES

RECORD = TrainConfig()
VOCAB = 50257


def test_a_plan_shows_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    out = capsys.readouterr().out
    assert "112,934,400 parameters" in out and "RTX 5090" in out and "is predicted" in out
    for text in ("output head", "tok/s", "kWh", "FP8 can bring at most", "NVFP4 brings", "memory"):
        assert text in out
    assert main(["plan", "--batch_size", "2048"]) == 0
    assert "take a smaller batch" in capsys.readouterr().out


def test_predicted_parts_are_those_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand from the plan's lines; and both are in the line of a bench on a GPU that is listed."""
    gpu, software, recipe = GPUS["h100"], SOFTWARE["compiled"], RECIPES["fp8"]
    predicted = predicted_shares(RECORD, VOCAB, gpu, software, recipe)
    assert list(predicted) == list(StepPart) and all(predicted.values())
    work = micro_batch_work(RECORD, VOCAB, software, recipe)
    times = {each.name: each.seconds(gpu, software) for each in work}
    head = times["output head"] + times["logits and loss"]
    assert predicted[StepPart.HEAD] == pytest.approx(head / sum(times.values()))
    measured = dict.fromkeys(map(str, StepPart), 1 / 7)  # as they come from a worker, by JSON
    config = dataclasses.replace(RECORD, compile=True, dtype="fp8", backend="te")
    line = shares_line(measured, config, VOCAB, gpu)
    assert f"head and loss 14% (predicted {predicted[StepPart.HEAD]:.0%})" in line
    assert "predicted" not in shares_line(measured, config, VOCAB, None)
