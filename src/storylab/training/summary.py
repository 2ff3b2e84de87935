"""The summary of a run: what it reached, and what that took."""

from __future__ import annotations

import math
from typing import Any

from storylab.precision.quantize import wrong_kernels
from storylab.training.evaluation import Evaluation
from storylab.training.setup import TrainingSetup


def summarize(
    setup: TrainingSetup, status: str, evaluation: Evaluation | None, **measured: Any
) -> dict[str, Any]:
    """``summary.json`` of a run.

    Args:
        setup: with the progress at its end.
        status: ``finished`` or ``diverged``.
        evaluation: of the whole validation split in bfloat16, if it was made.
        measured: power, energy, use of cores and samples.
    """
    progress, device = setup.progress, setup.precision.device
    tokens = progress.next_iteration * setup.config.tokens_per_iteration
    seconds = progress.training_seconds
    return {
        "status": status,
        "emulated": setup.precision.backend == "emulated",
        "wrong_kernels": wrong_kernels() if setup.state.quantization is not None else [],
        "iterations": progress.next_iteration,
        "tokens": tokens,
        "epochs": setup.batches.epochs(progress.next_iteration),
        "unseen_tokens": setup.batches.unseen,
        "parameters": sum(p.numel() for p in setup.state.model.parameters()),
        "final_train_loss": progress.train_loss,
        "final_val_loss": progress.val_loss,
        "best_val_loss": progress.best_val_loss,
        "best_iteration": progress.best_iteration,
        "validation": None if evaluation is None else evaluation_summary(evaluation),
        "seconds": progress.seconds,
        "training_seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens else 0.0,
        "peak_memory_bytes": progress.peak_memory_bytes,
        "memory_kind": "allocated on the GPU" if device.type == "cuda" else "resident",
        **measured,
    }


def evaluation_summary(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation of a whole split as JSON values."""
    error = evaluation.standard_error
    return {
        "loss": evaluation.loss,
        "standard_error": None if math.isnan(error) else error,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte,
        "stories": len(evaluation.story_losses),
        "tokens": int(evaluation.story_tokens.sum()),
        "block_size": evaluation.block_size,
    }
