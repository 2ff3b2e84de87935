"""Evaluations within a run: estimates along the way; the whole validation and test splits and samples at
its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from storylab.data.dataset import Split
from storylab.data.layout import TRAIN, VALIDATION
from storylab.record.schema import EvaluationRow, Sample
from storylab.training import log_format
from storylab.training.checkpointing import Checkpoints
from storylab.training.cores import CoreSharing
from storylab.training.evaluation import Evaluation, estimate_loss, evaluate_split
from storylab.training.recorder import Recorder
from storylab.training.sampling import StoryModel
from storylab.training.setup import TrainingSetup
from storylab.training.step import NonFiniteError

# The first one is that of the original log.
SAMPLE_PROMPTS = (
    "Once upon a time there was a little",
    "Lily and Ben found a strange box in the garden.",
    "Tom was sad because",
)


@dataclass(frozen=True)
class FinalEvaluation:
    """The whole validation split under the final weights, in bfloat16 or wider and, for a run in low
    precision, in its own; the whole test split, in bfloat16 or wider, if there is one; and a sample for
    each prompt."""

    evaluation: Evaluation
    own_precision: Evaluation | None
    test: Evaluation | None
    samples: list[Sample]


class Evaluator:
    """Evaluates the model of a run under way.

    Args:
        setup: the run.
        recorder: gets lines and rows.
        checkpoints: keeps the best weights.
        cores: an evaluation may use all threads.
        leave: called before every batch, of all ranks at once; raises if a signal has come.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        recorder: Recorder,
        checkpoints: Checkpoints,
        cores: CoreSharing,
        leave: Callable[[], None],
    ) -> None:
        self.setup, self.recorder, self.checkpoints = setup, recorder, checkpoints
        self._cores, self._leave = cores, leave

    def evaluate(self, iteration: int) -> None:
        """Estimate both losses on the fixed windows, and save the weights if they are the best.

        Raises:
            NonFiniteError: a loss is not finite.
        """
        progress = self.setup.progress
        with self._as_evaluated():
            train_loss, val_loss = self._estimate(TRAIN), self._estimate(VALIDATION)
            if not math.isfinite(train_loss + val_loss):
                raise NonFiniteError(f"train loss is {train_loss} and validation loss {val_loss}")
            # A stop after this evaluation makes a resumed run come here again.
            again = progress.best_iteration == iteration
            best = again or progress.best_val_loss is None or val_loss < progress.best_val_loss
            self.recorder.line("")
            self.recorder.line(log_format.evaluation_line(iteration, train_loss, val_loss))
            if best:
                progress.best_val_loss, progress.best_iteration = val_loss, iteration
                self.checkpoints.save_best(iteration, val_loss)
                self.recorder.line(log_format.best_line(val_loss))
        self.recorder.line("")
        progress.train_loss, progress.val_loss = train_loss, val_loss
        row = EvaluationRow(
            iteration=iteration, train_loss=train_loss, val_loss=val_loss, best=best
        )
        self.recorder.rows([row])

    def final(self) -> FinalEvaluation:
        """Evaluate the current weights on the whole validation and test splits, and sample from them.

        Here alone the test split is opened. Its losses are stored, and neither printed nor logged.

        Raises:
            NonFiniteError: a loss is not finite.
            UserError: a file of the test split is missing or altered.
        """
        quantization, dataset = self.setup.state.quantization, self.setup.dataset
        validation = dataset.splits[VALIDATION]
        with self._as_evaluated():
            own = self._whole(validation) if quantization is not None else None
            # Without the recipe, so that arms of every precision are evaluated in the same way.
            with quantization.disabled() if quantization else nullcontext():
                evaluation = self._whole(validation)
                samples = [Sample(prompt=text, text=self._sample(text)) for text in SAMPLE_PROMPTS]
                test = self._whole(dataset.open_test()) if dataset.has_test else None
        return FinalEvaluation(evaluation, own, test, samples)

    def _estimate(self, split: str) -> float:
        setup, config = self.setup, self.setup.config
        data, size, batches = setup.dataset.splits[split], config.block_size, config.eval_iters
        model, ranks = setup.state.model, setup.state.ranks
        return estimate_loss(model, data, size, batches, setup.precision, self._tick, ranks)

    def _whole(self, split: Split) -> Evaluation:
        setup = self.setup
        size, precision = setup.config.block_size, setup.precision
        model, ranks = setup.state.model, setup.state.ranks
        evaluation = evaluate_split(model, split, size, precision, self._tick, ranks=ranks)
        if not math.isfinite(evaluation.loss):
            raise NonFiniteError(f"final {split.name} loss is {evaluation.loss}")
        return evaluation

    def _sample(self, prompt: str) -> str:
        setup = self.setup
        size, tokenizer = setup.config.block_size, setup.dataset.tokenizer
        return StoryModel(setup.state.model, tokenizer, size, setup.precision).sample(prompt)[0]

    @contextmanager
    def _as_evaluated(self) -> Iterator[None]:
        """The model with its averaged weights, if it keeps some, and uncompiled: shapes vary, and a loss
        should not depend on how the training was sped up."""
        compiled = self.setup.config.compile
        stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with stance, self.setup.state.averaged(), self._cores.all_threads():
            yield

    def _tick(self, done: int, total: int) -> None:
        self._leave()
        self.recorder.observers.progress("evaluating", done, total)
