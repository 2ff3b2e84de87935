"""Rows and summary of a run, recomputed from its config and from each other."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from storylab.optim.schedule import learning_rate
from storylab.record.folder import DATA, METRICS, SUMMARY
from storylab.record.run import median_speed, training_memory
from storylab.record.schema import EvaluationRow, IterationRow
from storylab.verify.findings import Difference, Finding, close, unequal
from storylab.verify.run_files import RunSubject

# Rows of one kind that are named one by one.
NAMED = 5


def _first(found: Iterator[Difference], what: str) -> Iterator[Finding]:
    """The first differences of many rows, and how many more there are."""
    every = list(found)
    yield from every[:NAMED]
    if len(every) > NAMED:
        yield Difference(METRICS, f"and {len(every) - NAMED} more {what}")


# The loops below run over millions of rows of many runs, so words are made for wrong ones alone.


def token_faults(subject: RunSubject) -> Iterator[Finding]:
    """Rows whose tokens, or tokens a second, are not those of the config and the row's seconds."""
    run = subject.run
    tokens = run.config.tokens_per_iteration

    def faults() -> Iterator[Difference]:
        for row in run.iterations:
            total, speed = (row.iteration + 1) * tokens, tokens / row.step_seconds
            if row.tokens != total:
                yield _wrong(row, "tokens", total, "the config")
            if not close(row.tokens_per_second, speed):
                yield _wrong(row, "tokens_per_second", speed, "its step_seconds")

    yield from _first(faults(), "rows with other tokens")


def rate_faults(subject: RunSubject) -> Iterator[Finding]:
    """Rows whose learning rate is not the schedule's."""
    config = subject.run.config

    def faults() -> Iterator[Difference]:
        for row in subject.run.iterations:
            rate = learning_rate(config, row.iteration)
            if not close(row.learning_rate, rate):
                yield _wrong(row, "learning_rate", rate, "the schedule")

    yield from _first(faults(), "rows with another learning rate")


def clipping_faults(subject: RunSubject) -> Iterator[Finding]:
    """Rows that say the gradient was clipped where its norm says otherwise."""
    limit = subject.run.config.grad_clip or math.inf

    def faults() -> Iterator[Difference]:
        for row in subject.run.iterations:
            clipped = row.grad_norm is not None and row.grad_norm > limit
            if row.clipped != clipped:
                yield _wrong(row, "clipped", clipped, "its grad_norm")

    yield from _first(faults(), "rows")


def _wrong(row: IterationRow, name: str, computed: object, source: str) -> Difference:
    recorded = getattr(row, name)
    return Difference(
        METRICS, f"iteration {row.iteration}: {name} is {recorded}, but {computed} from {source}"
    )


def evaluation_faults(subject: RunSubject) -> Iterator[Finding]:
    """Evaluations at other iterations than the config's, or marked best where they are not."""
    run = subject.run
    rows = [row for row in run.rows if isinstance(row, EvaluationRow)]
    if run.finished:
        last, every = run.config.max_iters, run.config.eval_interval
        due = sorted({*range(every, run.results.iterations, every), last} - {0})
        # A run that was made longer has one at its earlier end, too.
        found = {row.iteration for row in rows}
        if missing := [iteration for iteration in due if iteration not in found]:
            yield Difference(
                METRICS,
                f"{len(missing)} evaluations are missing, the first one before iteration {missing[0]}",
            )
    best = math.inf
    for row in rows:
        name = f"evaluation of iteration {row.iteration}: best"
        yield from unequal(METRICS, name, row.best, row.val_loss < best, "those before it", True)
        best = min(best, row.val_loss)


def summary_faults(subject: RunSubject) -> Iterator[Finding]:
    """Values of the summary that are not those of the rows, the config and the environment."""
    run = subject.run
    if run.summary is None:
        return
    summary, steps, tokens = run.summary, run.iterations, run.config.tokens_per_iteration
    evaluations = [row for row in run.rows if isinstance(row, EvaluationRow)]
    last = evaluations[-1] if evaluations else None
    best = min(evaluations, key=lambda row: row.val_loss, default=None)
    seconds = float(np.sum([row.step_seconds for row in steps]))
    vocabulary = run.data.tokenizer.vocab_size
    model = run.config.model.parameter_count(vocabulary)
    for name, value, source in (
        ("started", run.environment.started, "environment.json"),
        ("parameters", model, f"config.json and {DATA}"),
        ("iterations", len(steps), METRICS),
        ("tokens", len(steps) * tokens, METRICS),
        ("final_train_loss", last and last.train_loss, METRICS),
        ("final_val_loss", last and last.val_loss, METRICS),
        ("best_val_loss", best and best.val_loss, METRICS),
        ("best_iteration", best and best.iteration, METRICS),
        ("training_seconds", seconds, METRICS),
        ("tokens_per_second", len(steps) * tokens / seconds if steps else 0.0, METRICS),
        ("median_tokens_per_second", median_speed(run.rows, tokens), METRICS),
        ("training_memory_bytes", training_memory(run.rows), METRICS),
    ):
        recorded = getattr(summary, name)
        # Fields that summaries of earlier versions do not have.
        if recorded is not None or name not in (
            "median_tokens_per_second",
            "training_memory_bytes",
        ):
            yield from unequal(SUMMARY, name, recorded, value, source)
