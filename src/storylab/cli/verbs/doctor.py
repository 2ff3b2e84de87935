"""``storylab doctor``."""

from __future__ import annotations

from dataclasses import dataclass

from storylab.cli.arguments import AsJson
from storylab.cli.documents import print_document
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
    json: AsJson = False


def run(call: Call) -> int:
    """Print the machine's devices and speeds as they become known."""
    command = call.parse(DoctorCommand)
    from storylab.doctor import examination, examine, examine_precision

    device, presets = command.device, command.presets
    if command.json:
        print_document(lambda: examination(device, presets, command.precision))
        return 0
    lines = examine_precision(device) if command.precision else examine(device, presets)
    for line in lines:
        print(line, flush=True)
    return 0


VERB = Verb(
    "doctor",
    "devices, precisions and training speed of this machine",
    "runs",
    run,
    DoctorCommand,
    position=7,
)
