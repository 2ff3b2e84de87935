"""The parts of a measured step."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import torch

from storylab.config import preset_config
from storylab.model.cost import StepPart
from storylab.training.measure import StepTimer, part_of


def test_a_kernel_belongs_to_the_operation_that_started_it() -> None:
    above = SimpleNamespace(name="aten::_scaled_dot_product_flash_attention", cpu_parent=None)
    event = SimpleNamespace(name="aten::_flash_attention_forward", cpu_parent=above)
    assert part_of(event) is StepPart.ATTENTION


@pytest.mark.slow
def test_the_parts_of_a_step_are_its_whole() -> None:
    config = preset_config("nano")
    config = dataclasses.replace(config, batch_size=2, block_size=32, device="cpu", dtype="mxfp8")
    parts, started = StepTimer(config, 300), time.perf_counter()
    seconds = parts.part_seconds(2)
    assert set(seconds) == set(StepPart)
    for part in StepPart:
        assert seconds[part] > 0, part
    assert sum(seconds.values()) < time.perf_counter() - started


def test_steps_on_a_gpu_are_timed_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training the host does not wait for a GPU between steps."""
    config = preset_config("nano")
    config = dataclasses.replace(config, batch_size=1, block_size=8, device="cpu")
    timer, steps, waits = StepTimer(config, 300), Mock(), Mock()
    monkeypatch.setattr(timer.state, "step", steps)
    monkeypatch.setattr("storylab.training.measure.synchronize", waits)
    assert timer.step(1, in_a_row=3) > 0
    assert (steps.call_count, waits.call_count) == (3, 2)
    assert len(timer.times(1, 0.0, least=2)) == 2
    # Nothing here has a GPU.
    timer.device = torch.device("cuda")
    step = Mock(side_effect=[1.0, 3.0])
    monkeypatch.setattr(timer, "step", step)
    assert timer.times(1, 0.0, least=6) == [1.0] * 5 + [3.0] * 5
    assert step.call_args_list == [call(1, 5)] * 2
