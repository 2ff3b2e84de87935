"""Compiled code computes the same as uncompiled code; a run whose compiler fails goes on without it."""

from __future__ import annotations

import dataclasses

from storylab.errors import UserError, out_of_memory
from storylab.training.check import Check, Finding, Subject
from storylab.training.compile_check import check_compiled, compiler_is_to_blame
from storylab.training.setup import TrainingSetup
from storylab.training.step import NonFiniteError


def applies(subject: Subject) -> bool:
    """Whether the run is compiled."""
    return bool(subject.setup.config.compile)


def run(subject: Subject) -> Finding:
    """Compare loss and gradients of the next micro-batch, compiled and uncompiled."""
    setup = subject.setup

    def tick(done: int, total: int) -> None:
        subject.observers.progress("checking the compiled code", done, total)

    try:
        check = check_compiled(setup.state, subject.micro_batch, tick)
    except Exception as error:
        if out_of_memory(error):
            raise
        # The run can go on without a compiler, so any of its failures is caught.
        reason = " ".join(str(error).split("\n\n")[0].split())[:300]
        return Finding(
            "", f"torch.compile fails on this machine ({reason or type(error).__name__})"
        )
    setup.compile_checks.append(check)
    if not check.passed:
        return Finding("", f"torch.compile gives wrong results on this machine ({check.fault})")
    return Finding(f"loss {check.loss:.4f}, uncompiled {check.loss_uncompiled:.4f}")


def fall_back(subject: Subject, fault: str) -> TrainingSetup:
    """The same run uncompiled.

    Raises:
        UserError: the user asked for compiling by name.
    """
    if subject.compile_asked:
        raise UserError(
            f"{fault}: leave out --compile, or try another compiler (the variable CXX on a CPU, another "
            "torch on a GPU)"
        )
    setup = subject.setup
    subject.observers.line(f"{fault}: training goes on uncompiled")
    config = dataclasses.replace(setup.config, compile=False)
    plain = TrainingSetup(config, setup.dataset, setup.precision)
    plain.compile_checks, plain.compile_fault = setup.compile_checks, fault
    if subject.resumed is not None:
        plain.restore(subject.resumed)
    return plain


def require_blameless_compiler(setup: TrainingSetup, error: NonFiniteError) -> None:
    """Make sure that numbers which are not finite come from the recipe and not from compiled code.

    A run calls this where it has diverged, at any iteration.

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


CHECK = Check("compiled code", 90, run, applies=applies, on_resume=True, fall_back=fall_back)
