"""The checks: a check is one entry."""

from __future__ import annotations

from storylab.verify import data_sets, experiments, losses, rows, run_data, run_files
from storylab.verify.data_sets import DataSubject
from storylab.verify.experiments import ExperimentSubject
from storylab.verify.findings import Check
from storylab.verify.run_files import RunSubject

RUN_CHECKS: tuple[Check[RunSubject], ...] = (
    Check(
        "bytes",
        "the SHA-256 of every file, against `SHA256SUMS`; checkpoints at depth `files`",
        "all",
        run_files.changed_bytes,
    ),
    Check(
        "tokens",
        "tokens of every row from the config, tokens a second from the row's seconds",
        "`metrics.jsonl`",
        rows.token_faults,
    ),
    Check(
        "learning rates",
        "the learning rate of every row from the schedule",
        "`metrics.jsonl`",
        rows.rate_faults,
    ),
    Check(
        "clipping",
        "whether the gradient was clipped, from its norm",
        "`metrics.jsonl`",
        rows.clipping_faults,
    ),
    Check(
        "evaluations",
        "the iterations of evaluations from the config, and which were the best so far",
        "`metrics.jsonl`",
        rows.evaluation_faults,
    ),
    Check(
        "summary",
        "parameters from the config; iterations, tokens, best and last losses, seconds, speeds and memory "
        "from the rows",
        "`summary.json`",
        rows.summary_faults,
    ),
    Check(
        "losses",
        "loss, standard error, perplexity, bits per byte, stories and tokens of a split, from its losses "
        "by story",
        "`summary.json`, `story_losses.npy`, `test_losses.npy`",
        losses.story_faults,
    ),
    Check(
        "tokenizer",
        "the tokenizer's hash and size",
        "`tokenizer.tiktoken`, `data.json`",
        run_data.tokenizer_faults,
    ),
    Check(
        "data",
        "fingerprint, tokenizer, request and sizes, from the data set's manifest",
        "`data.json`",
        run_data.data_faults,
    ),
    Check(
        "checkpoints",
        "the checkpoints' own hashes; their iteration and losses from the summary; rows and log of a run "
        "under way from the hash in its checkpoint",
        "`checkpoints/`",
        run_files.checkpoint_faults,
        "files",
    ),
    Check(
        "first batch",
        "the hash of the first batch, epochs and unseen tokens, from data, seed and config",
        "`environment.json`, `summary.json`",
        run_data.batch_faults,
        "weights",
    ),
    Check(
        "initial weights",
        "the hash of the initial weights, from the seed",
        "`environment.json`",
        run_data.initial_weight_faults,
        "weights",
    ),
    Check(
        "final loss",
        "losses by story and position, the best loss and the samples, from weights and data",
        "`story_losses.npy`, `test_losses.npy`, `position_losses.npy`, `summary.json`",
        losses.evaluation_faults,
        "weights",
    ),
)
DATA_CHECKS: tuple[Check[DataSubject], ...] = (
    Check(
        "bytes",
        "the SHA-256 of every file, against `SHA256SUMS`",
        "all",
        data_sets.changed_bytes,
    ),
    Check(
        "manifest",
        "the fingerprint; tokens, stories and bytes of every split, and where stories end, from the shards",
        "`manifest.json`",
        data_sets.manifest_faults,
    ),
)
EXPERIMENT_CHECKS: tuple[Check[ExperimentSubject], ...] = (
    Check(
        "plan",
        "the hash of the registered plan",
        "`experiments/LABEL.json`",
        experiments.plan_faults,
    ),
    Check(
        "runs",
        "whether the listed runs can be read",
        "`experiments/LABEL.json`",
        experiments.run_faults,
    ),
    Check(
        "verdicts",
        "the arms that each look settled, from the runs",
        "`experiments/LABEL.json`",
        experiments.verdict_faults,
    ),
    Check(
        "report",
        "the verdicts in `RUNS/report/EXPERIMENTS.md`, from the runs",
        "`EXPERIMENTS.md`",
        experiments.report_faults,
    ),
)
