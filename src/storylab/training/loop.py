"""The training loop: one run, from its config to its summary."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from storylab.config import TrainConfig
from storylab.data.batches import Prefetcher, TrainingBatches
from storylab.data.dataset import Dataset, load_dataset
from storylab.data.sources import TRAIN, VALIDATION
from storylab.errors import UserError, out_of_memory
from storylab.files import exclusive, write_json
from storylab.precision import selftest
from storylab.precision.convert import low_share
from storylab.precision.hardware import require_aligned
from storylab.precision.observe import QuantizationStatistics
from storylab.precision.quantize import wrong_kernels
from storylab.record import checkpoint
from storylab.record.folder import (
    LOG,
    POSITION_LOSSES,
    PRECISION,
    STORY_LOSSES,
    RunFolder,
    create_run,
    require_free,
)
from storylab.record.run import median_speed, training_memory
from storylab.record.schema import (
    EvaluationRow,
    IterationRow,
    QuantizationRow,
    Sample,
    SplitLoss,
    Summary,
)
from storylab.training import lines
from storylab.training.compile_check import CompileCheck, check_compiled, compiler_is_to_blame
from storylab.training.cores import CoreSharing, considerate, same_bits_with_one_thread
from storylab.training.evaluation import Evaluation, estimate_loss, evaluate_split
from storylab.training.learner import Learner
from storylab.training.precision import (
    Precision,
    choose_device,
    choose_precision,
    resolve_compile,
)
from storylab.training.progress import PendingIteration, Progress, StopRequested, StopSignal
from storylab.training.sampling import StoryModel
from storylab.training.saving import Saver
from storylab.training.schedule import learning_rate
from storylab.training.signals import stop_signals
from storylab.training.step import NonFiniteError, StepReport, StepResult
from storylab.training.telemetry import Telemetry, peak_memory_bytes

# The first one is the record's.
SAMPLE_PROMPTS = (
    "Once upon a time there was a little",
    "Lily and Ben found a strange box in the garden.",
    "Tom was sad because",
)


class Reporter(Protocol):
    """Where a run tells how it goes. The library itself prints nothing."""

    def line(self, text: str) -> None:
        """A line of the log."""
        ...

    def progress(self, name: str, done: int, total: int) -> None:
        """How much of the work called ``name`` is done."""
        ...


class SilentReporter:
    """Keeps everything to the run folder."""

    def line(self, text: str) -> None: ...

    def progress(self, name: str, done: int, total: int) -> None: ...


class TrainingInterrupted(Exception):  # noqa: N818 - asked for, so no error
    """SIGTERM or Ctrl-C: the run is saved and can be resumed."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class TrainingDiverged(Exception):  # noqa: N818 - a result rather than a fault
    """Loss or gradients became non-finite; the weights from before are saved."""


def train(config: TrainConfig, reporter: Reporter | None = None) -> RunFolder:
    """Train a model as ``config`` says, in a new run folder.

    Raises:
        UserError: data, device or folder cannot be used, or the disk is full.
        TrainingInterrupted: a signal stopped it; the run can be resumed.
        TrainingDiverged: loss or gradients are not finite.
    """
    asked = config.compile is True
    config, precision = resolve(config)
    dataset = load_dataset(config.data_dir)
    dataset.require_window(config.block_size)
    trainer = Trainer(config, dataset, precision, reporter or SilentReporter())
    trainer = checked(trainer, asked=asked)
    run = create_run(trainer.config, dataset, trainer.identity())
    with exclusive(run.folder):
        return trainer.train(run)


def checked(trainer: Trainer, run: RunFolder | None = None, asked: bool = False) -> Trainer:
    """The trainer whose compiled code has been compared with uncompiled code, or one that does not compile
    where the two differ.

    Args:
        trainer: not started yet.
        run: what it has been restored from, if anything.
        asked: compiling was asked for by name, so that going on without it is not what is wanted.

    Raises:
        UserError: the compiled code is wrong, and was asked for.
    """
    if not trainer.config.compile:
        return trainer
    try:
        trainer.check_compiled()
        wrong = next((check.fault for check in trainer.compile_checks if not check.passed), None)
        fault = wrong and f"torch.compile gives wrong results on this machine ({wrong})"
    except Exception as error:
        if out_of_memory(error):
            raise
        # Whatever the compiler failed with, the run needs none.
        reason = " ".join(str(error).split("\n\n")[0].split())[:300]
        fault = f"torch.compile fails on this machine ({reason or type(error).__name__})"
    if fault is None:
        return trainer
    if asked:
        raise UserError(
            f"{fault}: leave out --compile, or try another compiler (the variable CXX on a CPU, another "
            "torch on a GPU)"
        )
    trainer.reporter.line(f"{fault}: training goes on uncompiled")
    config = dataclasses.replace(trainer.config, compile=False)
    plain = Trainer(config, trainer.dataset, trainer.precision, trainer.reporter)
    plain.compile_checks, plain.compile_fault = trainer.compile_checks, fault
    if run is not None:
        plain.restore(run)
    return plain


def resolve(config: TrainConfig) -> tuple[TrainConfig, Precision]:
    """The config with every default filled in, and its precision, checked without the data.

    Raises:
        UserError: there is no such device, it lacks the dtype, ``out_dir`` is in use, or the learning
            rate would rise after its warm-up.
    """
    config.require_no_rise()
    method = "" if config.method == "record" else f"{config.method}-"
    name = f"{config.preset}-{method}{config.dtype}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = config.out_dir or Path("runs") / name
    config, precision = resolve_device(dataclasses.replace(config, out_dir=folder))
    require_free(folder)
    return config, precision


def resolve_device(config: TrainConfig) -> tuple[TrainConfig, Precision]:
    """The config with device, data seed and compiling filled in, and its precision, for new and old runs.

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


class Trainer:
    """Model, optimizer and data of one run, and how far it has come."""

    def __init__(
        self, config: TrainConfig, dataset: Dataset, precision: Precision, reporter: Reporter
    ) -> None:
        self.config, self.dataset = config, dataset
        self.precision, self.reporter = precision, reporter
        self.learner = Learner(config, dataset.vocab_size, precision)
        self.model, self.quantization = self.learner.model, self.learner.quantization
        self.batches = TrainingBatches(
            dataset.splits[TRAIN],
            dataset.fingerprint,
            config.resolved_data_seed,
            config.block_size,
            config.batch_size * config.gradient_accumulation_steps,
        )
        self.progress = Progress()
        self.stop = StopSignal()
        self.compile_checks: list[CompileCheck] = []
        self.compile_fault: str | None = None
        """Why the run is not compiled although it was to be."""

    def check_compiled(self) -> None:
        """Compare the compiled model with the uncompiled one on the next micro-batch, in every shape that
        the run will meet."""
        first = self.progress.next_iteration
        windows = self.batches(first)[: self.config.batch_size].to(self.precision.device)
        shapes = dict.fromkeys(self.learner.pieces(i) for i in (first, self.config.max_iters))
        with considerate(self.precision.device):
            for pieces in shapes:
                check = check_compiled(self.learner, windows, pieces, self._tick_check)
                self.compile_checks.append(check)

    def _tick_check(self, done: int, total: int) -> None:
        self.reporter.progress("checking the compiled code", done, total)

    def compile_record(self) -> dict[str, Any]:
        """What the checks of the compiled code found, for the run's environment."""
        if not self.compile_checks and self.compile_fault is None:
            return {}
        checks = [check.to_dict() for check in self.compile_checks]
        return {"compile_checks": checks, "compile_fault": self.compile_fault}

    def identity(self) -> dict[str, Any]:
        """The device, hashes that prove what runs share, initial weights and first batch, and what the
        checks of the compiled code found."""
        device = self.precision.device
        cuda = device.type == "cuda"
        return {
            "device": str(device),
            "gpu": torch.cuda.get_device_name(device) if cuda else None,
            "initial_weights_sha256": checkpoint.weights_sha256(
                dict(self.model.named_parameters())
            ),
            "first_batch_sha256": hashlib.sha256(self.batches(0).numpy().tobytes()).hexdigest(),
            **self.compile_record(),
        }

    def restore(self, run: RunFolder) -> None:
        """Go back to the run's last checkpoint, or stay at the start if it has none yet."""
        if not run.checkpoint("last").exists() and not run.read_rows():
            return  # killed before it had trained
        tensors, state = checkpoint.load(run.checkpoint("last"))
        self.progress = Progress.from_dict(state)
        if self.quantization is not None:
            self.quantization.advance(max(self.progress.next_iteration - 1, 0))
        checkpoint.restore(self.model, self.learner.optimizers, self.learner.average, tensors)
        if self.progress.scaler:
            self.learner.scaler.load_state_dict(self.progress.scaler)

    def train(self, run: RunFolder) -> RunFolder:
        """Train from where the progress stands to ``max_iters``, evaluate, and sum up.

        The caller holds the run folder, so that no other process writes to it.
        """
        self.run = run
        cuda = self.precision.device.type == "cuda"
        self.prefetcher = Prefetcher(self.batches, pin=cuda)
        self.unread: list[PendingIteration] = []
        self.saved_iteration: int | None = None
        self.telemetry = Telemetry(self.precision.device, self.progress.power)
        cpu = self.precision.device.type == "cpu"
        self.cores = CoreSharing(cpu, self._same_bits_with_one_thread, self._line)
        self.saver = Saver(self.precision.device)
        self.lap_start = self.saved_at = time.perf_counter()
        try:
            with self.telemetry, stop_signals(self.stop.note):
                try:
                    self._train_to_the_end()
                except NonFiniteError as error:
                    self._read()  # float16 tells of it before the iterations under way are read
                    self._require_blameless_compiler(error)
                    raise TrainingDiverged(self._diverged(error)) from error
        finally:
            self.saver.close()
            self.cores.close()
            self.prefetcher.close()
        return run

    def _train_to_the_end(self) -> None:
        try:
            if not self.run.checkpoint("last").exists():
                self._save_last()  # so that there always is one from before a fault
                cuda = self.precision.device.type == "cuda"
                block_size, tokens = self.config.block_size, len(self.batches.split)
                for line in (
                    *lines.attention_lines(self.config.model, block_size, cuda),
                    *lines.unseen_lines(self.batches.unseen, tokens, block_size),
                ):
                    self._line(line)
            self._test_precision()
            self._iterate()
            self._finish()
        except StopRequested:
            self._read()
            self._save_last()
            self.saver.wait()
            number = self.stop.number or signal.SIGINT
            message = (
                f"Stopped before iteration {self.progress.next_iteration}; continue with: "
                f"storylab resume {self.run.folder}"
            )
            raise TrainingInterrupted(message, number) from None

    def _test_precision(self) -> None:
        """Make sure that quantised layers multiply as their recipe says, and write down how."""
        recipe, hardware = self.precision.recipe, self.precision.hardware
        if recipe is None:
            return
        checks = selftest.check_model(self.model.blocks, recipe, hardware)
        share = low_share(
            recipe, self.config.model, self.dataset.vocab_size, self.config.block_size
        )
        found = selftest.summarize(checks) | {
            "backend": self.precision.backend,
            "share_of_flops": share,
        }
        write_json(self.run.folder / PRECISION, found)
        self._line(lines.precision_line(self.config.dtype, found))

    def _iterate(self) -> None:
        for iteration in range(self.progress.next_iteration, self.config.max_iters + 1):
            if self._evaluation_due(iteration):
                with self._as_evaluated():
                    self._evaluate(iteration)
            started = time.perf_counter()
            if not self.unread:
                self.unread_since = started
            batch = self.prefetcher(iteration).to(self.precision.device, non_blocking=True)
            waited = time.perf_counter() - started
            result = self._step(iteration, batch)
            self.unread.append(PendingIteration(iteration, result, waited))
            checkpoint_due = self._checkpoint_due(iteration)
            line_due = iteration % self.config.log_interval == 0
            if (
                self._reads_at_once()
                or line_due
                or checkpoint_due
                or self._evaluation_due(iteration + 1)
            ):
                self._read()
            if checkpoint_due:
                self._save_last()
        self._read()

    def _reads_at_once(self) -> bool:
        """Whether the host would gain nothing by running ahead."""
        return self.precision.device.type != "cuda"

    def _read(self) -> None:
        """Wait for the iterations that are under way and write down how they went.

        On a GPU the host runs ahead of it until a line is due, so what is known is the time of all
        of them together; each is given its share.
        """
        unread, self.unread = self.unread, []
        if not unread:
            return
        reports: list[StepReport] = []
        fault: NonFiniteError | None = None
        for entry in unread:
            try:
                reports.append(entry.result.read())
            except NonFiniteError as error:
                fault = error  # what came after it is of no use
                break
        self._record(list(zip(unread, reports, strict=False)))
        if fault is not None:
            raise fault

    def _step(self, iteration: int, batch: torch.Tensor) -> StepResult:
        def between() -> None:
            self.stop.check()
            self.cores.tick()

        self.cores.begin()
        with self._quantization_at(iteration):
            rate = learning_rate(self.config, iteration)
            result = self.learner.step(iteration, batch, rate, between)
        self.cores.end()
        return result

    def _same_bits_with_one_thread(self) -> bool:
        iteration = self.progress.next_iteration
        windows = self.batches(iteration)[: self.config.batch_size]
        rate = learning_rate(self.config, iteration)
        return same_bits_with_one_thread(self.learner, iteration, windows, rate)

    @contextmanager
    def _quantization_at(self, iteration: int) -> Iterator[None]:
        """Keep the quantised layers up with the training, and watch them where it was asked for."""
        state = self.quantization
        if state is None:
            yield
            return
        state.advance(iteration)
        if self.config.quantization_stats and (iteration == 0 or self._evaluation_due(iteration)):
            statistics = QuantizationStatistics()
            with state.watched(statistics):
                yield
            rows = [QuantizationRow(iteration=iteration, **row) for row in statistics.rows()]
            self.run.append_rows(rows)
        else:
            yield
        state.weights_changed()

    def _evaluation_due(self, iteration: int) -> bool:
        due = iteration % self.config.eval_interval == 0 or iteration == self.config.max_iters
        return due and iteration > 0

    def _checkpoint_due(self, iteration: int) -> bool:
        minutes = (time.perf_counter() - self.saved_at) / 60
        return self._evaluation_due(iteration) or minutes >= self.config.checkpoint_minutes

    def _evaluate(self, iteration: int) -> None:
        """Estimate both losses on the fixed windows and keep the weights if they are the best."""
        train_loss, val_loss = (
            estimate_loss(
                self.model,
                self.dataset.splits[name],
                self.config.block_size,
                self.config.eval_iters,
                self.precision,
                self._tick,
            )
            for name in (TRAIN, VALIDATION)
        )
        if not math.isfinite(train_loss + val_loss):
            raise NonFiniteError(f"train loss is {train_loss} and validation loss {val_loss}")
        state = self.progress
        # A stop after this evaluation makes a resumed run come here again.
        again = state.best_iteration == iteration
        best = again or state.best_val_loss is None or val_loss < state.best_val_loss
        self._line("")
        self._line(lines.evaluation_line(iteration, train_loss, val_loss))
        if best:
            state.best_val_loss, state.best_iteration = val_loss, iteration
            best_state = {"iteration": iteration, "val_loss": val_loss}
            self.saver.save(self.run.checkpoint("best"), self.model.state_dict(), best_state)
            self._line(lines.best_line(val_loss))
        self._line("")
        state.train_loss, state.val_loss = train_loss, val_loss
        row = EvaluationRow(
            iteration=iteration, train_loss=train_loss, val_loss=val_loss, best=best
        )
        self.run.append_rows([row])

    @contextmanager
    def _as_evaluated(self) -> Iterator[None]:
        """The model as it is evaluated and sampled from: with its average weights, if it keeps some, and
        uncompiled, as shapes vary and a loss should not depend on how the training was sped up."""
        compiled = self.config.compile
        stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with stance, self.learner.averaged(), self.cores.all_threads():
            yield

    def _tick(self, done: int, total: int) -> None:
        """Before every evaluation batch: leave if a signal has come, else tell how far it is."""
        self.stop.check()
        self.reporter.progress("evaluating", done, total)

    def _record(self, done: Sequence[tuple[PendingIteration, StepReport]]) -> None:
        """Write the metrics of iterations that are done, and the line that is due at the last of them.

        One look at the clock, the meters and the files for all: the device has nothing to do meanwhile.
        """
        if not done:
            return
        state, config = self.progress, self.config
        now = time.perf_counter()
        seconds = (now - self.unread_since) / len(done)
        state.seconds += now - self.lap_start
        state.seconds_since_line += now - self.lap_start
        self.lap_start = now
        state.training_seconds += seconds * len(done)
        state.peak_memory_bytes = max(
            state.peak_memory_bytes, peak_memory_bytes(self.precision.device)
        )
        meters = self.telemetry.latest()
        rows = []
        for entry, report in done:
            row = IterationRow(
                iteration=entry.iteration,
                loss=report.loss,
                learning_rate=learning_rate(config, entry.iteration),
                grad_norm=report.grad_norm,
                clipped=report.clipped,
                tokens=(entry.iteration + 1) * config.tokens_per_iteration,
                tokens_per_second=config.tokens_per_iteration / seconds,
                step_seconds=seconds,
                data_seconds=entry.waited,
                peak_memory_bytes=state.peak_memory_bytes,
                **meters,
            )
            rows.append(row)
        self.run.append_rows(rows)
        last, report = done[-1]
        state.next_iteration = last.iteration + 1
        if last.iteration % config.log_interval == 0 or last.iteration == config.max_iters:
            tokens = (last.iteration - state.last_line) * config.tokens_per_iteration
            rate = learning_rate(config, last.iteration)
            elapsed = state.seconds_since_line
            self._line(lines.iteration_line(last.iteration, report.loss, elapsed, tokens, rate))
            state.last_line, state.seconds_since_line = last.iteration, 0.0
        self.reporter.progress("training", last.iteration + 1, config.max_iters + 1)

    def _require_blameless_compiler(self, error: NonFiniteError) -> None:
        """Raise a UserError if compiled code is what made a batch's numbers non-finite: that says nothing
        of the recipe, so it must not be a result."""
        iteration = self.progress.next_iteration
        if not self.config.compile or iteration > self.config.max_iters:
            return
        batch = self.batches(iteration).to(self.precision.device)
        if compiler_is_to_blame(self.learner, batch, self.learner.pieces(iteration)):
            raise UserError(
                f"iteration {iteration}: {error} in compiled code, but finite uncompiled: the compiler "
                "is at fault, not the recipe; train in a new folder with --no_compile"
            ) from error

    def _diverged(self, error: NonFiniteError) -> str:
        """Write down that the run has diverged. The last checkpoint stays: it is from before."""
        iteration = self.progress.next_iteration
        rate = learning_rate(self.config, iteration)
        message = (
            f"iteration {iteration}: {error} at learning rate {rate:.2e}; training stopped, the "
            f"last good weights are in {self.run.checkpoint('last')}. Try a lower "
            "--learning_rate, a longer --warmup_iters, or --dtype float32"
        )
        self.run.append(LOG, message)  # the caller shows it
        self.run.write_summary(self._summary("diverged", None, [], reason=str(error)))
        return message

    def _finish(self) -> None:
        """Evaluate the final weights on the whole validation split, sample, and sum up."""
        if self.saved_iteration != self.progress.next_iteration:
            self._save_last()
        with self._as_evaluated():
            own = self._evaluate_whole() if self.quantization is not None else None
            # Without the recipe, so that arms of other precisions are evaluated alike.
            with self.quantization.disabled() if self.quantization else nullcontext():
                evaluation = self._evaluate_whole()
                samples = [Sample(prompt=text, text=self._sample(text)) for text in SAMPLE_PROMPTS]
        self.saver.wait()
        table = np.stack((evaluation.story_losses, evaluation.story_tokens), axis=1)
        self.run.write_array(STORY_LOSSES, table)
        self.run.write_array(POSITION_LOSSES, evaluation.position_losses)
        summary = self._summary("finished", evaluation, samples, own)
        self.run.write_summary(summary)
        for line in ("", *lines.summary_lines(summary)):
            self._line(line)

    def _evaluate_whole(self) -> Evaluation:
        evaluation = evaluate_split(
            self.model,
            self.dataset.splits[VALIDATION],
            self.config.block_size,
            self.precision,
            self._tick,
        )
        if not math.isfinite(evaluation.loss):
            raise NonFiniteError(f"final validation loss is {evaluation.loss}")
        return evaluation

    def _sample(self, prompt: str) -> str:
        tokenizer = self.dataset.tokenizer
        writer = StoryModel(self.model, tokenizer, self.config.block_size, self.precision)
        return writer.sample(prompt)[0]

    def _summary(
        self,
        status: Literal["finished", "diverged"],
        evaluation: Evaluation | None,
        samples: list[Sample],
        own: Evaluation | None = None,
        reason: str = "",
    ) -> Summary:
        state, device = self.progress, self.precision.device
        tokens = state.next_iteration * self.config.tokens_per_iteration
        rows = self.run.read_rows()  # those of the stages before a resume included
        return Summary(
            status=status,
            emulated=self.precision.backend == "emulated",
            wrong_kernels=wrong_kernels() if self.quantization is not None else [],
            started=self.run.read_environment().started,
            iterations=state.next_iteration,
            tokens=tokens,
            epochs=self.batches.epochs(state.next_iteration),
            unseen_tokens=self.batches.unseen,
            parameters=sum(p.numel() for p in self.model.parameters()),
            final_train_loss=state.train_loss,
            final_val_loss=state.val_loss,
            best_val_loss=state.best_val_loss,
            best_iteration=state.best_iteration,
            validation=_evaluation_summary(evaluation),
            seconds=state.seconds,
            training_seconds=state.training_seconds,
            tokens_per_second=tokens / state.training_seconds if tokens else 0.0,
            median_tokens_per_second=median_speed(rows, self.config.tokens_per_iteration),
            **self.telemetry.means(),
            peak_memory_bytes=state.peak_memory_bytes,
            training_memory_bytes=training_memory(rows),
            memory_kind="allocated on the GPU" if device.type == "cuda" else "resident",
            other_cores=self.cores.other_cores,
            samples=samples,
            validation_own_precision=_evaluation_summary(own),
            reason=reason,
        )

    def _save_last(self) -> None:
        state = dataclasses.replace(
            self.progress, power=self.telemetry.totals(), scaler=self.learner.scaler.state_dict()
        )
        self.run.sync_metrics()
        tensors = checkpoint.training_tensors(
            self.model, self.learner.optimizers, self.learner.average
        )
        self.saver.save(self.run.checkpoint("last"), tensors, dataclasses.asdict(state))
        self.saved_at, self.saved_iteration = time.perf_counter(), self.progress.next_iteration

    def _line(self, text: str) -> None:
        self.run.append(LOG, text)
        self.reporter.line(text)


def _evaluation_summary(evaluation: Evaluation | None) -> SplitLoss | None:
    if evaluation is None:
        return None
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
