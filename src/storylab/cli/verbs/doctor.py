"""``storylab doctor``."""

from __future__ import annotations

from dataclasses import dataclass

from storylab.cli.registry import Call, Verb
from storylab.config import PresetName


@dataclass(frozen=True)
class DoctorCommand:
    """Check this machine: devices, precisions, memory, and the speed of real training steps.

    Examples: storylab doctor | storylab doctor --presets 10m 113m | storylab doctor --precision
    """

    precision: bool = False
    """Test the low-precision recipes instead: which ones run here, and with which error."""
    presets: tuple[PresetName, ...] = ("nano", "10m", "113m")
    """Models to time, for a few micro-batches each."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


def run(call: Call) -> int:
    """Print the machine's devices and speeds as they become known."""
    command = call.parse(DoctorCommand)
    from storylab.doctor import examine, examine_precision

    device = command.device
    lines = examine_precision(device) if command.precision else examine(device, command.presets)
    for line in lines:
        print(line, flush=True)
    return 0


VERB = Verb(
    "doctor", "devices, precisions and training speed of this machine", "runs", run, position=7
)
