"""Devices and dtypes that a machine lacks are refused."""

from __future__ import annotations

import pytest
import torch

from finished_runs import CPU
from storylab.errors import UserError
from storylab.training.precision import (
    choose_device,
    choose_precision,
)


def test_devices_that_are_not_there_are_refused() -> None:
    for name in ("tpu", "cuda:99", "xpu"):
        with pytest.raises(UserError, match="use"):
            choose_device(name)
    if not torch.cuda.is_available():
        assert choose_device("auto") == CPU


def test_bfloat16_on_a_card_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match="Tesla T4 has no bfloat16: use --dtype float16"):
        choose_precision(torch.device("cuda"), "bfloat16")
    assert choose_precision(torch.device("cuda"), "float16").dtype == torch.float16
