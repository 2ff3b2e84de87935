"""Classes of machines: on two machines of one class, the speeds of runs can be compared."""

from __future__ import annotations

from storylab.errors import UserError
from storylab.experiments.plan import PlannedRun
from storylab.experiments.queue import QueuedExperiment
from storylab.experiments.recording import update_record
from storylab.record.experiment_schema import ExperimentRecord
from storylab.record.folder import RunFolder
from storylab.record.provenance import current_stage
from storylab.record.schema import Environment, Stage


def machine_class(stage: Stage, device: str, gpu: str | None) -> str:
    """The class of a machine in words: all that :func:`~storylab.experiments.confounds.speed_confounds`
    compares of a machine, and the version of torch.

    Args:
        stage: the machine and the packages.
        device: a device of torch, such as ``cuda``.
        gpu: name of the GPU, if the device is one.
    """
    return (
        f"{gpu or device}, {stage.processor} ({stage.cpu}), {stage.cores} cores, "
        f"{stage.threads} threads, {stage.platform}, torch {stage.packages.torch}"
    )


def class_here(device: str) -> str:
    """The class of this machine for runs on ``device``."""
    import torch

    gpu = torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else None
    return machine_class(current_stage(), device, gpu)


class SeedClasses:
    """Keeps all arms of a seed on machines of one class: the class whose worker began the seed.

    The record of the experiment has the class of every seed.

    Args:
        queued: the experiment.
    """

    def __init__(self, queued: QueuedExperiment) -> None:
        self._queued = queued
        self._here: dict[str, str] = {}

    def other_class(self, run: PlannedRun) -> str | None:
        """The class of machines that the seed of a run is for, if it is not this machine's. A seed that
        nobody has begun becomes this machine's.

        Raises:
            UserError: the record cannot be read or written.
        """
        device, seed = run.cell.config.device, str(run.seed)
        here = self._here.get(device) or self._here.setdefault(device, class_here(device))
        path, cache = self._queued.record, self._queued.cache
        if seed not in cache.record(path).machines:
            begun = self._begun_on(run) or here

            def change(record: ExperimentRecord) -> dict[str, object]:
                return {"machines": {seed: begun} | record.machines}

            update_record(path, cache, change)
        found = cache.record(path).machines[seed]
        return None if found == here else found

    def _begun_on(self, run: PlannedRun) -> str | None:
        """The class of the machine on which some run of the seed was begun."""
        for other in self._queued.planned:
            if other.seed == run.seed:
                try:
                    found: Environment = RunFolder(other.folder).read_environment()
                except UserError:
                    continue
                return machine_class(found, found.device, found.gpu)
        return None
