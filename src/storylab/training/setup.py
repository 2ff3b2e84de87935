"""From a config to everything that a run needs before its first step."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storylab.compiler import missing_for_compiling
from storylab.config import TrainConfig, to_dict
from storylab.data.batches import TrainingBatches
from storylab.data.dataset import Dataset
from storylab.data.layout import TRAIN
from storylab.errors import UserError
from storylab.precision.backends.protocol import require_aligned
from storylab.record import checkpoint
from storylab.record.folder import METRICS, RunFolder
from storylab.record.provenance import code_sha256
from storylab.record.schema import Checks
from storylab.record.stages import require_free, require_prefix
from storylab.training.compile_check import CompileCheck
from storylab.training.compile_policy import worth_compiling
from storylab.training.precision import ComputePolicy, choose_device, choose_precision
from storylab.training.ranks import ONE_PROCESS, Ranks
from storylab.training.run_progress import RunProgress
from storylab.training.state import TrainState


def resolve(config: TrainConfig, ranks: Ranks = ONE_PROCESS) -> tuple[TrainConfig, ComputePolicy]:
    """Fill in every default of the config of a new run, and choose its precision, without the data.

    Raises:
        UserError: there is no such device, it lacks the dtype, ``out_dir`` is in use, or the learning
            rate would rise after its warm-up.
    """
    config.require_no_rise()
    method = "" if config.method == "record" else f"{config.method}-"
    name = f"{config.preset}-{method}{config.dtype}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(ranks.text(str(config.out_dir or Path("runs") / name)))
    config, precision = resolve_device(dataclasses.replace(config, out_dir=folder))
    ranks.require(config, precision)
    require_free(folder)
    return config, precision


def resolve_device(config: TrainConfig) -> tuple[TrainConfig, ComputePolicy]:
    """Fill in device, data seed and compiling, and choose the precision, for new and old runs.

    Raises:
        UserError: there is no such device, it lacks the dtype, or nothing can compile for it.
    """
    device = choose_device(config.device)
    precision = choose_precision(device, config.dtype, config.recipe, config.backend)
    if precision.hardware is not None:
        require_aligned(precision.hardware, config.model, config.block_size)
    if config.quantization_stats and precision.hardware is not None:
        raise UserError(
            "--quantization_stats sees emulated tensors only: leave it out, or add "
            "--backend emulated"
        )
    resolved = dataclasses.replace(
        config,
        device=str(precision.device),
        data_seed=config.resolved_data_seed,
        backend=precision.backend,
        compile=resolve_compile(config, precision),
    )
    return resolved, precision


def resolve_compile(config: TrainConfig, precision: ComputePolicy) -> bool:
    """Whether to compile the blocks: as the config says, or else where it pays and can be done.

    Raises:
        UserError: the config asks for it and it cannot be done.
    """
    device = precision.device.type
    missing = missing_for_compiling(device)
    if config.compile:
        compiles = precision.hardware is not None and precision.hardware.compiles
        if precision.recipe is not None and not compiles:
            raise UserError(
                f"--compile is not for {config.dtype} with --backend {precision.backend}: leave it out"
            )
        if missing is not None:
            raise UserError(
                f"--compile on {device} needs {missing}: install it, or leave --compile out"
            )
    if config.compile is not None:
        return config.compile
    return precision.recipe is None and missing is None and worth_compiling(config, device)


class TrainingSetup:
    """A run before its first step, or before its next one after :meth:`restore`.

    Attributes:
        state: everything that a step reads or updates.
        batches: the training batch of every iteration.
        progress: how far the run has come.
        compile_checks: results of comparing compiled with uncompiled code.
        compile_fault: the fault for which a run goes on uncompiled; None otherwise.
        checks: results of the checks before the first step; None before they have run.
        precision_info: the content of ``precision.json``; None without a recipe or its check.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, precision: ComputePolicy) -> None:
        self.config, self.dataset, self.precision = config, dataset, precision
        self.state = TrainState(config, dataset.vocab_size, precision)
        self.batches = TrainingBatches(
            dataset.splits[TRAIN],
            dataset.fingerprint,
            config.resolved_data_seed,
            config.block_size,
            config.batch_size * config.gradient_accumulation_steps,
        )
        self.progress = RunProgress()
        self.compile_checks: list[CompileCheck] = []
        self.compile_fault: str | None = None
        self.checks: Checks | None = None
        self.precision_info: dict[str, Any] | None = None

    def restore(self, run: RunFolder) -> str | None:
        """Go to the run's last checkpoint, or stay at the start if it has none yet.

        Returns:
            Why the checkpoint before the last one is used; None where it is the last one.

        Raises:
            UserError: the checkpoints are damaged or belong to another config, or the rows so far are
                damaged.
        """
        last, previous = run.checkpoint("last"), run.checkpoint("previous")
        if not (last.exists() or previous.exists() or run.read_rows()):
            return None  # killed before it had trained
        tensors, values, fault = _load_good(last, previous)
        self.progress = RunProgress.from_dict(values)
        require_prefix(run.folder, METRICS, self.progress.prefixes)
        self.load(tensors, self.progress)
        return fault

    def load(self, tensors: dict[str, Tensor], progress: RunProgress) -> None:
        """Load the tensors of the checkpoint that ``progress`` was saved in.

        Raises:
            UserError: they belong to another config.
        """
        if self.state.quantization is not None:
            self.state.quantization.advance(max(progress.next_iteration - 1, 0))
        self.state.restore(tensors)
        if progress.scaler:
            self.state.scaler.load_state_dict(progress.scaler)

    def require_same(self, ranks: Ranks) -> None:
        """Raise a UserError unless all processes of the run are about to do the same."""
        ranks.require_same(
            lambda: (
                f"{self.progress.next_iteration} {self.dataset.fingerprint} {code_sha256()} "
                f"{checkpoint.weights_sha256(self.state.tensors())} {to_dict(self.config)}"
            )
        )

    def identity(self) -> dict[str, Any]:
        """Device, hashes of the initial weights and of the first batch, and results of the checks, for
        ``environment.json``. The hashes prove which runs share weights and data order."""
        device = self.precision.device
        cuda = device.type == "cuda"
        weights = {name: p.detach() for name, p in self.state.model.named_parameters()}
        return {
            "device": str(device),
            "gpu": torch.cuda.get_device_name(device) if cuda else None,
            "initial_weights_sha256": checkpoint.weights_sha256(weights),
            "first_batch_sha256": hashlib.sha256(self.batches(0).numpy().tobytes()).hexdigest(),
            **self.findings(),
        }

    def findings(self) -> dict[str, Any]:
        """Results of the checks before the first step, for ``environment.json``; empty if none has run."""
        found: dict[str, Any] = {} if self.checks is None else {"checks": self.checks}
        if self.compile_checks or self.compile_fault is not None:
            checks = [check.to_dict() for check in self.compile_checks]
            found |= {"compile_checks": checks, "compile_fault": self.compile_fault}
        return found


def _load_good(last: Path, previous: Path) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """Tensors and state of the last checkpoint, or of the one before it with the fault of the last one.

    Raises:
        UserError: neither can be used.
    """
    try:
        return *checkpoint.load(last), None
    except UserError as error:
        if not previous.exists():
            raise
        fault = str(error)
    try:
        return *checkpoint.load(previous), fault
    except UserError as error:
        raise UserError(f"{fault}; and the one before it: {error}") from error
