"""Adjust the cells of an experiment to each other: equal compute, and the same choice of compiling."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from storylab.config import (
    NATIVE_DTYPES,
    TrainConfig,
)
from storylab.experiments.experiment import Cell, Experiment
from storylab.model.cost import training_flops
from storylab.training.compile_policy import worth_compiling


def matched_cells(experiment: Experiment) -> Iterable[Cell]:
    """The cells; those of a matched condition train until they have used the baseline's compute."""
    for cell in experiment.cells:
        if cell.condition not in experiment.matched or cell.arm == experiment.baseline:
            yield cell
            continue
        base = experiment.cell(cell.condition, experiment.baseline).config
        vocab_size = experiment.vocab_size
        ratio = _flops(base, vocab_size) / _flops(cell.config, vocab_size)
        ratio *= base.tokens_per_iteration / cell.config.tokens_per_iteration
        updates = max(1, round(base.iterations * ratio))
        stretch = (updates - 1) / max(base.max_iters, 1)
        warmup = round(cell.config.warmup_iters * stretch)
        config = dataclasses.replace(cell.config, max_iters=updates - 1, warmup_iters=warmup)
        yield dataclasses.replace(cell, config=config)


def equally_compiled(experiment: Experiment, device: str = "cpu") -> Iterable[Cell]:
    """The cells with the same choice of compiling, as arms must not differ in it. Unless the file
    decides, all are uncompiled if one cannot be compiled or is too short for it on this type of device."""
    short = any(
        cell.config.dtype not in NATIVE_DTYPES or not worth_compiling(cell.config, device)
        for cell in experiment.cells
    )
    for cell in experiment.cells:
        if short and cell.config.compile is None:
            cell = dataclasses.replace(cell, config=dataclasses.replace(cell.config, compile=False))
        yield cell


def _flops(config: TrainConfig, vocab_size: int) -> float:
    return training_flops(config.model, vocab_size, config.block_size)
