"""Checks before the first step, in which compiled code and quantized layers prove themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

from storylab.errors import UserError, out_of_memory
from storylab.precision import selftest
from storylab.precision.recipes import quantized_flops_fraction
from storylab.record.folder import RunFolder
from storylab.training.compile_check import check_compiled, compiler_is_to_blame
from storylab.training.cores import considerate
from storylab.training.observers import Observers
from storylab.training.setup import TrainingSetup
from storylab.training.step import NonFiniteError


def with_proven_compiler(
    setup: TrainingSetup, observers: Observers, run: RunFolder | None = None, asked: bool = False
) -> TrainingSetup:
    """Compare compiled with uncompiled code; returns the setup, or an uncompiled one if they differ.

    Args:
        setup: not started yet.
        observers: see the progress, and a line where the run goes on uncompiled.
        run: the run it was restored from, if any.
        asked: whether compiling was asked for by name, so that going on without it is not wanted.

    Raises:
        UserError: the compiled code is wrong, and was asked for.
    """
    if not setup.config.compile:
        return setup
    try:
        _compare(setup, observers)
        wrong = next((check.fault for check in setup.compile_checks if not check.passed), None)
        fault = wrong and f"torch.compile gives wrong results on this machine ({wrong})"
    except Exception as error:
        if out_of_memory(error):
            raise
        # The run can go on without a compiler, so any of its failures is caught.
        reason = " ".join(str(error).split("\n\n")[0].split())[:300]
        fault = f"torch.compile fails on this machine ({reason or type(error).__name__})"
    if fault is None:
        return setup
    if asked:
        raise UserError(
            f"{fault}: leave out --compile, or try another compiler (the variable CXX on a CPU, another "
            "torch on a GPU)"
        )
    observers.line(f"{fault}: training goes on uncompiled")
    config = dataclasses.replace(setup.config, compile=False)
    plain = TrainingSetup(config, setup.dataset, setup.precision)
    plain.compile_checks, plain.compile_fault = setup.compile_checks, fault
    if run is not None:
        plain.restore(run)
    return plain


def _compare(setup: TrainingSetup, observers: Observers) -> None:
    """Compare compiled and uncompiled code on the next micro-batch."""

    def tick(done: int, total: int) -> None:
        observers.progress("checking the compiled code", done, total)

    batch = setup.batches(setup.progress.next_iteration)
    windows = batch[: setup.config.batch_size].to(setup.precision.device)
    with considerate(setup.precision.device):
        setup.compile_checks.append(check_compiled(setup.state, windows, tick))


def require_blameless_compiler(setup: TrainingSetup, error: NonFiniteError) -> None:
    """Make sure that numbers which are not finite come from the recipe and not from compiled code.

    Raises:
        UserError: the current batch is finite uncompiled. The compiler is at fault and not the
            recipe, so the run must not end as a result.
    """
    iteration = setup.progress.next_iteration
    if not setup.config.compile or iteration > setup.config.max_iters:
        return
    batch = setup.batches(iteration).to(setup.precision.device)
    if compiler_is_to_blame(setup.state, batch):
        raise UserError(
            f"iteration {iteration}: {error} in compiled code, but finite uncompiled: the compiler "
            "is at fault, not the recipe; train in a new folder with --no_compile"
        ) from error


def check_precision(setup: TrainingSetup) -> dict[str, Any] | None:
    """Make sure that quantized layers multiply as their recipe says; the findings for ``precision.json``,
    or None without a recipe.

    Raises:
        UserError: a product does not run as its recipe says.
    """
    precision, config = setup.precision, setup.config
    if precision.recipe is None:
        return None
    checks = selftest.check_model(setup.state.model.blocks, precision.recipe, precision.hardware)
    share = quantized_flops_fraction(
        precision.recipe, config.model, setup.dataset.vocab_size, config.block_size
    )
    found = {"backend": precision.backend, "share_of_flops": share}
    return selftest.summarize(checks) | found
