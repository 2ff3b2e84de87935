"""The parts of a measured step."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from storylab.config import preset_config
from storylab.model.cost import StepPart
from storylab.training.measure import StepTimer, part_of


def test_a_kernel_belongs_to_the_operation_that_started_it() -> None:
    above = SimpleNamespace(name="aten::_scaled_dot_product_flash_attention", cpu_parent=None)
    event = SimpleNamespace(name="aten::_flash_attention_forward", cpu_parent=above)
    assert part_of(event) is StepPart.ATTENTION


def test_the_parts_of_a_step_are_its_whole() -> None:
    config = preset_config("nano")
    config = dataclasses.replace(config, batch_size=2, block_size=32, device="cpu", dtype="mxfp8")
    shares = StepTimer(config, 300).shares(2)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert set(shares) == set(StepPart) and all(share >= 0 for share in shares.values())
    for part in StepPart:
        assert shares[part] > 0, part
