"""The end of a run: its summary, and the losses of stories and positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from storylab.optim.schedule import learning_rate
from storylab.precision.quantize import wrong_kernels
from storylab.record.folder import LOG, POSITION_LOSSES, STORY_LOSSES, TEST_LOSSES, RunFolder
from storylab.record.run import median_speed, training_memory
from storylab.record.schema import SplitLoss, Summary
from storylab.record.stages import end_run
from storylab.training import log_format
from storylab.training.evaluation import Evaluation
from storylab.training.evaluator import FinalEvaluation
from storylab.training.setup import TrainingSetup
from storylab.training.step import NonFiniteError


def write_finished(
    run: RunFolder,
    setup: TrainingSetup,
    final: FinalEvaluation,
    measured: Mapping[str, Any],
    line: Callable[[str], None],
) -> Summary:
    """Write the final losses and the summary of a run that reached its end, the latter to ``line``, too;
    returns the summary."""
    evaluation, own, test = final.evaluation, final.own_precision, final.test
    for name, whole in ((STORY_LOSSES, evaluation), (TEST_LOSSES, test)):
        if whole is not None:
            run.write_array(name, np.stack((whole.story_losses, whole.story_tokens), axis=1))
    run.write_array(POSITION_LOSSES, evaluation.position_losses)
    summary = summarize(
        run,
        setup,
        evaluation,
        **measured,
        samples=final.samples,
        validation_own_precision=None if own is None else evaluation_summary(own),
        test=None if test is None else evaluation_summary(test),
    )
    for text in ("", *log_format.summary_lines(summary)):
        line(text)
    end_run(run, summary)
    return summary


def write_diverged(
    run: RunFolder, setup: TrainingSetup, error: NonFiniteError, measured: Mapping[str, Any]
) -> tuple[str, Summary]:
    """Write down that a run has diverged; returns a message and the summary.

    The last checkpoint stays: it was saved before the fault.
    """
    iteration = setup.progress.next_iteration
    rate = learning_rate(setup.config, iteration)
    message = (
        f"iteration {iteration}: {error} at learning rate {rate:.2e}; training stopped, the "
        f"last good weights are in {run.checkpoint('last')}. Try a lower "
        "--learning_rate, a longer --warmup_iters, or --dtype float32"
    )
    run.append(LOG, message)  # the caller shows it
    summary = summarize(run, setup, None, **measured, samples=[], reason=str(error))
    end_run(run, summary)
    return message, summary


def summarize(
    run: RunFolder, setup: TrainingSetup, evaluation: Evaluation | None, **measured: Any
) -> Summary:
    """``summary.json`` of a run.

    Args:
        run: its rows and environment, those of the stages before a resume included.
        setup: with the progress at its end.
        evaluation: of the whole validation split in bfloat16; None if the run diverged.
        measured: power, energy, use of cores, samples, and other fields of the summary.
    """
    rows = run.read_rows()
    progress, device = setup.progress, setup.precision.device
    tokens = progress.next_iteration * setup.config.tokens_per_iteration
    seconds = progress.training_seconds
    return Summary(
        status="diverged" if evaluation is None else "finished",
        emulated=setup.precision.backend == "emulated",
        wrong_kernels=wrong_kernels() if setup.state.quantization is not None else [],
        started=run.read_environment().started,
        iterations=progress.next_iteration,
        tokens=tokens,
        epochs=setup.batches.epochs(progress.next_iteration),
        unseen_tokens=setup.batches.unseen,
        parameters=sum(p.numel() for p in setup.state.model.parameters()),
        final_train_loss=progress.train_loss,
        final_val_loss=progress.val_loss,
        best_val_loss=progress.best_val_loss,
        best_iteration=progress.best_iteration,
        validation=None if evaluation is None else evaluation_summary(evaluation),
        seconds=progress.seconds,
        training_seconds=seconds,
        tokens_per_second=tokens / seconds if tokens else 0.0,
        median_tokens_per_second=median_speed(rows, setup.config.tokens_per_iteration),
        peak_memory_bytes=progress.peak_memory_bytes,
        training_memory_bytes=training_memory(rows),
        skipped_steps=progress.skipped,
        rewinds=progress.rewinds,
        memory_kind="allocated on the GPU" if device.type == "cuda" else "resident",
        **measured,
    )


def evaluation_summary(evaluation: Evaluation) -> SplitLoss:
    """The evaluation of a whole split as the summary holds it."""
    error = evaluation.standard_error
    return SplitLoss(
        loss=evaluation.loss,
        standard_error=None if math.isnan(error) else error,
        perplexity=evaluation.perplexity,
        bits_per_byte=evaluation.bits_per_byte,
        stories=len(evaluation.story_losses),
        tokens=int(evaluation.story_tokens.sum()),
        block_size=evaluation.block_size,
    )
