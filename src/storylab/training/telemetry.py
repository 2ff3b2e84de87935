"""Memory, power and utilisation: what the device can tell, and None for what it cannot."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

SAMPLE_SECONDS = 1.0


def peak_memory_bytes(device: torch.device) -> int:
    """Greatest memory so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class PowerTotals:
    """Sums over a run, however often it was resumed; saved with its checkpoints."""

    samples: int = 0
    watts: float = 0.0
    percent: float = 0.0
    energy_joules: float | None = None


class Telemetry:
    """Reads an NVIDIA GPU's power, utilisation and energy in a thread once a second.

    Power and energy come from NVML counters; on any other device they stay None. Nothing is
    estimated from a card's rated power.
    """

    def __init__(self, device: torch.device, before: PowerTotals) -> None:
        self.device, self.before = device, before
        self.samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._nvml: Any = None
        self._handle: Any = None
        self._energy_start: float | None = None

    def __enter__(self) -> Telemetry:
        if self.device.type == "cuda":
            with contextlib.suppress(Exception):  # no driver library: everything stays None
                self._open()
        return self

    def _open(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        # By identity: NVML counts all cards, CUDA only the visible ones.
        identity = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(identity)
        self._energy_start = self._energy()
        self._thread = threading.Thread(target=self._sample_loop, daemon=True)
        self._thread.start()

    def _energy(self) -> float | None:
        """Joules that the card has used since the driver was loaded (Volta and later)."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except self._nvml.NVMLError:
            return None

    def _sample_loop(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            with contextlib.suppress(self._nvml.NVMLError):
                watts = self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
                percent = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
                self.samples.append((watts, float(percent)))

    def totals(self) -> PowerTotals:
        """Sums up to now, those from before a resume included."""
        samples = list(self.samples)
        return PowerTotals(
            self.before.samples + len(samples),
            self.before.watts + sum(watts for watts, _ in samples),
            self.before.percent + sum(percent for _, percent in samples),
            self._energy_so_far(),
        )

    def _energy_so_far(self) -> float | None:
        energy = self.before.energy_joules
        if self._energy_start is not None and (now := self._energy()) is not None:
            energy = (energy or 0.0) + now - self._energy_start
        return energy

    def latest(self) -> dict[str, float | None]:
        """The newest power (watts) and utilisation (percent), and the energy so far (joules)."""
        watts, percent = self.samples[-1] if self.samples else (None, None)
        return {
            "power_watts": watts,
            "utilization_percent": percent,
            "energy_joules": self._energy_so_far(),
        }

    def means(self) -> dict[str, float | None]:
        """Mean power and utilisation over the run, and its energy."""
        sums = self.totals()
        return {
            "power_watts": sums.watts / sums.samples if sums.samples else None,
            "utilization_percent": sums.percent / sums.samples if sums.samples else None,
            "energy_joules": sums.energy_joules,
        }

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._nvml.nvmlShutdown()
