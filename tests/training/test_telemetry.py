"""Power and energy from the driver's library, with a stand-in for it."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finished_runs import CPU
from storylab.training.telemetry import PowerTotals, Telemetry


class FakeNvml:
    """NVML's calls as its documentation has them: milliwatts, millijoules, percent."""

    class NVMLError(Exception):
        pass

    def __init__(self, has_energy: bool) -> None:
        self.has_energy, self.millijoules, self.open = has_energy, 5_000_000, False

    def nvmlInit(self) -> None:  # noqa: N802 - named by the library, as are those below
        self.open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open = False

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        assert uuid == "GPU-1234-abcd"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if not self.has_energy:
            raise self.NVMLError
        self.millijoules += 1000
        return self.millijoules

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return 300_000

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=80, memory=10)


@pytest.mark.parametrize("has_energy", [True, False])
def test_power_and_energy_come_from_nvml(monkeypatch: pytest.MonkeyPatch, has_energy: bool) -> None:
    nvml = FakeNvml(has_energy)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    properties = SimpleNamespace(uuid="1234-abcd")
    # As torch and the driver answer on a GPU; samples are taken quickly, so that the test is short.
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr("storylab.training.telemetry.SAMPLE_SECONDS", 0.001)
    before = PowerTotals(samples=1, watts=100.0, percent=40.0, energy_joules=7.0)
    with Telemetry(torch.device("cuda"), before) as telemetry:
        deadline = time.monotonic() + 30
        while not telemetry.samples and time.monotonic() < deadline:
            time.sleep(0.01)
        assert telemetry.latest()["power_watts"] == 300
        # Seven joules before the resume; the counter, read at the start, in latest() and here, has
        # gone up by two since.
        assert telemetry.totals().energy_joules == pytest.approx(9.0 if has_energy else 7.0)
        sums = telemetry.totals()
    assert sums.watts == 100 + 300 * (sums.samples - 1)
    assert not nvml.open


def test_nothing_is_known_of_a_cpu_s_power() -> None:
    with Telemetry(CPU, PowerTotals()) as telemetry:
        assert set(telemetry.latest().values()) | set(telemetry.means().values()) == {None}
