"""The files of a run as types.

Fields with a default came later than the first runs, whose files lack them. Losses are nats a token,
times seconds, memory bytes, energy joules, unless a field's name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from storylab.data.manifest import Count, Size, TokenizerInfo

# Wide enough for any run's numbers, narrow enough that sums and squares stay finite.
_MOST = 1e40
Loss = Annotated[float, Meta(ge=-_MOST, le=_MOST)]
Amount = Annotated[float, Meta(ge=0, le=_MOST)]
Positive = Annotated[float, Meta(gt=0, le=_MOST)]


class DataInfo(Struct, frozen=True, kw_only=True):
    """``data.json``: the data set of a run."""

    fingerprint: str
    tokenizer: TokenizerInfo
    dtype: str
    request: Any
    tokens: dict[str, Count]
    """Tokens of each split."""


class Packages(Struct, frozen=True, kw_only=True):
    """Versions of the packages that can change a run's numbers."""

    torch: str
    numpy: str
    safetensors: str | None = None
    tiktoken: str | None = None
    tokenizers: str | None = None
    pyarrow: str | None = None


class CudaVersions(Struct, frozen=True, kw_only=True):
    """Versions of the CUDA libraries and the driver, and the GPU's memory."""

    runtime: str | None
    cudnn: int | None
    triton: str | None
    driver: str | None
    memory_bytes: Count


class CheckRecord(Struct, frozen=True, kw_only=True):
    """A check before the first step of a stage, and what it found in one line."""

    name: str
    passed: bool
    """False only where the run goes on without the thing that was checked, which is the compiler."""
    seconds: Amount
    finding: str


class Checks(Struct, frozen=True, kw_only=True):
    """The checks before the first step of a stage."""

    skipped: bool
    """Whether --skip_checks left all of them out."""
    seconds: Amount
    results: list[CheckRecord] = field(default_factory=list)


class Stage(Struct, frozen=True, kw_only=True):
    """Code, packages and machine with which a run was started or resumed."""

    started: str
    command: list[str] = field(default_factory=list)
    storylab: str
    code_sha256: str
    git_commit: str | None
    python: str
    packages: Packages
    cuda: CudaVersions | UnsetType | None = UNSET
    """None without a CUDA device; not set where the version of storylab did not record it."""
    platform: str
    processor: str
    cpu: str
    memory_bytes: Count
    cores: int | None
    threads: Count
    world_size: Size = 1
    """Number of processes, each with these threads."""
    shared_machine: bool = False
    """Whether other runs may have used the machine at the same time."""
    compile_checks: list[dict[str, Any]] | UnsetType = UNSET
    """Findings of the checks of compiled code; not set if nothing was compiled."""
    compile_fault: str | UnsetType | None = UNSET
    """Fault for which the run goes on uncompiled; None if compiled code passed the checks."""
    checks: Checks | UnsetType = UNSET
    """Not set where the version of storylab did not record them."""


class Resumption(Stage, frozen=True, kw_only=True):
    """A later stage of a run, and the iteration it began with."""

    iteration: Count = 0


class Environment(Stage, frozen=True, kw_only=True):
    """``environment.json``."""

    device: str
    gpu: str | None
    initial_weights_sha256: str
    first_batch_sha256: str
    resumed: list[Resumption] = field(default_factory=list)


class SplitLoss(Struct, frozen=True, kw_only=True):
    """A loss on a whole split."""

    loss: Loss
    standard_error: Amount | None
    perplexity: float
    bits_per_byte: Loss
    stories: Size
    tokens: Size
    block_size: Size | None = None


class Sample(Struct, frozen=True, kw_only=True):
    """A story that the model wrote."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Rewind:
    """A fault at which a run went back; see ``on_divergence`` in the config."""

    iteration: Count
    """Iteration of the fault."""
    back_to: Count
    """Iteration that it went on with."""
    batches: Size
    """Batches that it passed over: each iteration from then on reads a batch that is later by so many."""
    reason: str


class Summary(Struct, frozen=True, kw_only=True):
    """``summary.json``: results of a run that has ended."""

    status: Literal["finished", "diverged"]
    emulated: bool = False
    wrong_kernels: list[str] = field(default_factory=list)
    started: str = ""
    iterations: Count
    tokens: Count
    epochs: Amount
    unseen_tokens: Count = 0
    parameters: Size
    final_train_loss: Loss | None
    final_val_loss: Loss | None
    best_val_loss: Loss | None
    best_iteration: Count | None
    validation: SplitLoss | None
    seconds: Amount
    training_seconds: Amount
    tokens_per_second: Amount
    median_tokens_per_second: Positive | None = None
    """See :func:`storylab.record.run.median_speed`."""
    power_watts: Amount | None
    utilization_percent: Amount | None = field(name="utilisation_percent")
    energy_joules: Amount | None
    peak_memory_bytes: Count
    training_memory_bytes: Count | None = None
    """See :func:`storylab.record.run.training_memory`."""
    memory_kind: str
    other_cores: float | None = None
    samples: list[Sample]
    validation_own_precision: SplitLoss | None = None
    test: SplitLoss | None = None
    """None where the data set has no test split. Nothing shows it but the confirmation of an experiment."""
    reason: str = ""
    """Why it diverged."""
    skipped_steps: Count = 0
    """Steps that were left out because loss or gradients were not finite (``on_divergence`` skip)."""
    rewinds: list[Rewind] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.status == "diverged":
            return
        for name in ("iterations", "tokens", "training_seconds", "tokens_per_second"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: is 0 in a finished run")
        if self.validation is None:
            raise ValueError("validation: is null in a finished run")
        if not self.samples:
            raise ValueError("samples: is empty in a finished run")


class IterationRow(Struct, frozen=True, kw_only=True, tag_field="kind", tag="iteration", gc=False):
    """A row of ``metrics.jsonl`` for an iteration; memory and energy count from the start of the run."""

    iteration: Count
    loss: Loss | None
    """None where it was not finite and the step was skipped."""
    learning_rate: float
    grad_norm: Amount | None
    """Before clipping; None where the step was skipped."""
    clipped: bool
    tokens: Count
    tokens_per_second: Positive
    step_seconds: Positive
    data_seconds: Amount
    peak_memory_bytes: Count
    power_watts: Amount | None
    utilization_percent: Amount | None = field(name="utilisation_percent")
    energy_joules: Amount | None


class EvaluationRow(
    Struct, frozen=True, kw_only=True, tag_field="kind", tag="evaluation", gc=False
):
    """A row of ``metrics.jsonl`` for an evaluation, which comes before the iteration of its number."""

    iteration: Count
    train_loss: Loss
    val_loss: Loss
    best: bool


class QuantizationRow(
    Struct, frozen=True, kw_only=True, tag_field="kind", tag="quantization", gc=False
):
    """A row of ``metrics.jsonl`` for a quantized tensor: relative error, shares of its values that became
    zero and that exceeded the format's range, and binary orders of the smallest and largest scale."""

    iteration: Count
    layer: str
    tensor: str
    product: str
    error: Loss
    underflow: Loss
    saturation: Loss
    scale_low: Loss
    scale_high: Loss


Row = IterationRow | EvaluationRow | QuantizationRow


class PrecisionInfo(Struct, frozen=True, kw_only=True):
    """``precision.json``: findings of the self-test of a low-precision run."""

    backend: str
    products: Count
    low: Count
    layers: dict[str, dict[str, float]]
    share_of_flops: Amount
    largest_distance_from_emulation: Amount | None


class Failure(Struct, frozen=True, kw_only=True):
    """``failure.json``: why a worker process ended without a summary."""

    outcome: str
    reason: str
    started: str
