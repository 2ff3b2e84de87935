"""Memory, power and utilization of a run's devices; None where a device does not report one."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import psutil
import torch

from storylab.training.ranks import ONE_PROCESS, Ranks

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SAMPLE_SECONDS = 1.0


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far, in bytes: allocated on a CUDA device, else resident in this process.

    A system that records no peak gives the memory at this moment.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)  # peak_wset: Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class PowerTotals:
    """Sums over a run, resumed parts included; saved with its checkpoints. Watts and joules are those of
    all devices, the percent are their mean."""

    samples: int = 0
    watts: float = 0.0
    percent: float = 0.0
    energy_joules: float | None = None


class Telemetry:
    """Read an NVIDIA GPU's power, utilization and energy in a thread once a second.

    Power (watts) and energy (joules) come from NVML's counters; on any other device they stay None.
    Nothing is estimated from a card's rated power. Each process reads its own card; the numbers that the
    methods return are those of the whole run, so that all processes call them at the same time.
    """

    def __init__(
        self, device: torch.device, before: PowerTotals, ranks: Ranks = ONE_PROCESS
    ) -> None:
        self.device, self.before, self._ranks = device, before, ranks
        self.samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._nvml: Any = None
        self._handle: Any = None
        self._energy_start: float | None = None

    def __enter__(self) -> Telemetry:
        if self.device.type == "cuda":
            with contextlib.suppress(Exception):  # no driver: everything stays None
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
        samples, before, size = list(self.samples), self.before, self._ranks.size
        count, watts, percent, energy = self._ranks.sum(
            [
                len(samples),
                sum(watts for watts, _ in samples),
                sum(percent for _, percent in samples),
                self._energy_used(),
            ]
        )
        return PowerTotals(
            before.samples + round(count / size),
            before.watts + watts,
            before.percent + percent / size,
            self._energy_so_far(energy),
        )

    def _energy_used(self) -> float:
        """Joules since the start of this process; NaN where unknown."""
        now = None if self._energy_start is None else self._energy()
        return math.nan if now is None or self._energy_start is None else now - self._energy_start

    def _energy_so_far(self, used: float) -> float | None:
        energy = self.before.energy_joules
        return energy if math.isnan(used) else (energy or 0.0) + used

    def peak_memory(self) -> int:
        """Peak memory so far, in bytes, see :func:`peak_memory_bytes`."""
        return int(self._ranks.sum([peak_memory_bytes(self.device)])[0])

    def latest(self) -> dict[str, float | None]:
        """The newest power (watts) and utilization (percent), and the energy so far (joules)."""
        own = self.samples[-1] if self.samples else (math.nan, math.nan)
        watts, percent, energy = self._ranks.sum([*own, self._energy_used()])
        return {
            "power_watts": None if math.isnan(watts) else watts,
            "utilization_percent": None if math.isnan(percent) else percent / self._ranks.size,
            "energy_joules": self._energy_so_far(energy),
        }

    def means(self) -> dict[str, float | None]:
        """Mean power (watts) and utilization (percent) over the run, and its energy (joules)."""
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
