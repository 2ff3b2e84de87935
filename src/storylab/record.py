"""The files of a run and of an experiment as types: what may be read in them, and nothing else.

Keys that came later than the first runs are ``NotRequired``.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from storylab.checked import LARGEST_INT, Range

# Wide enough for whatever a run can leave, narrow enough that sums and squares stay finite.
_MOST = 1e40
Count = Annotated[int, Range(0, LARGEST_INT)]
Size = Annotated[int, Range(1, LARGEST_INT)]
Loss = Annotated[float, Range(-_MOST, _MOST)]
Amount = Annotated[float, Range(0, _MOST)]
Positive = Annotated[float, Range(0, _MOST, above=True)]
Margin = Annotated[float, Range(0, sys.float_info.max, above=True)]


class TokenizerRecord(TypedDict):
    """The tokenizer of a data set."""

    name: str
    sha256: str
    vocab_size: Size
    end_of_text: Count


class DataRecord(TypedDict):
    """``data.json``."""

    fingerprint: str
    tokenizer: TokenizerRecord
    dtype: str
    request: object
    tokens: dict[str, Count]


class Packages(TypedDict):
    """Versions of the packages that decide numbers; there may be more."""

    torch: str
    numpy: str


class Stage(TypedDict):
    """What a run was started or resumed in."""

    started: str
    storylab: str
    code_sha256: str
    git_commit: str | None
    python: str
    packages: Packages
    platform: str
    processor: str
    cpu: str
    memory_bytes: Count
    cores: int | None
    threads: Count


class EnvironmentRecord(Stage):
    """``environment.json``."""

    device: str
    gpu: str | None
    initial_weights_sha256: str
    first_batch_sha256: str
    resumed: NotRequired[list[Stage]]


class EvaluationRecord(TypedDict):
    """A loss on the whole validation split."""

    loss: Loss
    standard_error: Amount | None
    perplexity: float
    bits_per_byte: Loss
    stories: Size
    tokens: Size
    block_size: NotRequired[Size]


class SampleRecord(TypedDict):
    """A story that the model wrote."""

    prompt: str
    text: str


class SummaryRecord(TypedDict):
    """``summary.json``."""

    status: Literal["finished", "diverged"]
    reason: NotRequired[str]
    emulated: NotRequired[bool]
    iterations: Count
    tokens: Count
    epochs: Amount
    parameters: Size
    final_train_loss: Loss | None
    final_val_loss: Loss | None
    best_val_loss: Loss | None
    best_iteration: Count | None
    validation: EvaluationRecord | None
    validation_own_precision: NotRequired[EvaluationRecord | None]
    seconds: Amount
    training_seconds: Amount
    tokens_per_second: Amount
    power_watts: Amount | None
    utilisation_percent: Amount | None
    energy_joules: Amount | None
    peak_memory_bytes: Count
    memory_kind: str
    samples: list[SampleRecord]


class FinishedRecord(TypedDict):
    """What ``summary.json`` of a finished run must have besides."""

    validation: EvaluationRecord
    iterations: Size
    tokens: Size
    training_seconds: Positive
    tokens_per_second: Positive


class IterationRow(TypedDict):
    """A row of ``metrics.jsonl`` for an iteration."""

    kind: Literal["iteration"]
    iteration: Count
    loss: Loss
    learning_rate: float
    grad_norm: Amount | None
    clipped: bool
    tokens: Count
    tokens_per_second: Positive
    step_seconds: Positive
    data_seconds: Amount
    peak_memory_bytes: Count
    power_watts: Amount | None
    utilisation_percent: Amount | None
    energy_joules: Amount | None


class EvaluationRow(TypedDict):
    """A row of ``metrics.jsonl`` for an evaluation."""

    kind: Literal["evaluation"]
    iteration: Count
    train_loss: Loss
    val_loss: Loss
    best: bool


class QuantizationRow(TypedDict):
    """A row of ``metrics.jsonl`` for a quantised tensor."""

    kind: Literal["quantization"]
    iteration: Count
    layer: str
    tensor: str
    product: str
    error: Loss
    underflow: Loss
    saturation: Loss
    scale_low: Loss
    scale_high: Loss


class RowKind(TypedDict):
    """What every row of ``metrics.jsonl`` says of itself."""

    kind: Literal["iteration", "evaluation", "quantization"]


ROWS: dict[str, Any] = {
    "iteration": IterationRow,
    "evaluation": EvaluationRow,
    "quantization": QuantizationRow,
}


class PrecisionRecord(TypedDict):
    """``precision.json``."""

    backend: str
    products: Count
    low: Count
    layers: dict[str, dict[str, float]]
    share_of_flops: Amount
    largest_distance_from_emulation: Amount | None


class FailureRecord(TypedDict):
    """``failure.json``: a run that failed before it could write down anything itself."""

    outcome: str
    reason: str
    started: str


class ExpectationRecord(TypedDict):
    """A number that a hypothesis names."""

    text: str
    metric: str
    arm: str
    at_least: float | None
    at_most: float | None
    condition: str | None


class CellRecord(TypedDict):
    """An arm under a condition: its config, and its run folders by seed."""

    condition: str
    arm: str
    config: dict[str, object]
    runs: dict[str, str]


class ExperimentRecord(TypedDict):
    """``experiments/LABEL.json``: which runs make up an experiment."""

    name: str
    file: str
    scale: str
    title: str
    purpose: str
    hypothesis: str
    note: str
    waits_for: str
    factor: str
    baseline: str
    arms: list[str]
    conditions: list[str]
    matched: list[str]
    seeds: list[Count]
    margin: Margin | None
    expectations: list[ExpectationRecord]
    cells: list[CellRecord]


class ShardRecord(TypedDict):
    """A file of token ids."""

    file: str
    tokens: Count
    sha256: str


class SplitRecord(TypedDict):
    """A split of a data set."""

    stories: Count
    tokens: Count
    text_bytes: Count
    shards: list[ShardRecord]
    stories_file: str
    stories_sha256: str
    duplicate_stories: Count


class SplitRecords(TypedDict):
    """Both splits."""

    train: SplitRecord
    validation: SplitRecord


class OverlapRecord(TypedDict):
    """Training stories that are also for validation."""

    train_stories_in_validation: Count
    left_out: bool


class ManifestRecord(TypedDict):
    """``manifest.json`` of a data set."""

    format: int
    request: object
    tokenizer: TokenizerRecord
    dtype: Literal["uint16", "uint32"]
    splits: SplitRecords
    overlap: OverlapRecord
    fingerprint: str
