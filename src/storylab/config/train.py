"""The typed config of a training run, of which the flags of ``storylab train`` and their help are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from storylab.config.marks import (
    COUNT,
    COUNT_OR_NONE,
    DECAY,
    MOST,
    NUMBER,
    RATE,
    SEED,
    SHARE,
    at_most,
    check_fields,
    mark,
)
from storylab.config.model import ModelConfig
from storylab.errors import UserError
from storylab.optim import OPTIMIZERS
from storylab.optim.schedule import SCHEDULES

Dtype = Literal[
    "float32",
    "bfloat16",
    "float16",
    "fp8",
    "fp8-current",
    "fp8-rowwise",
    "mxfp8",
    "nvfp4",
    "nvfp4-plain",
    "fp4",
    "nvf4",
]
NATIVE_DTYPES = ("float32", "bfloat16", "float16")
# Products in these would widen a residual stream of bfloat16.
WIDENING_DTYPES = ("float32", "float16")
Backend = Literal["auto", "emulated", "te", "torchao", "native"]
DivergencePolicy = Literal["stop", "skip", "rewind"]
Parallel = Literal["ddp", "fsdp"]
MethodName = Literal["record", "fast", "portable"]
PresetName = Literal["nano", "3m", "6m", "10m", "50m", "113m", "200m", "350m"]
# The names are those of the entries, so that a new one is named in one place.
if TYPE_CHECKING:
    OptimizerName = str
    ScheduleName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]
    ScheduleName = Literal[tuple(SCHEDULES)]
DEFAULT_PRESET: PresetName = "113m"
DEFAULT_DATA_DIR = Path("data/tinystories-gpt2")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are those of the original log: 113M parameters, 131,072 tokens
    an iteration."""

    preset: Annotated[PresetName, mark("preset", effect="result")] = DEFAULT_PRESET
    """Named model shape; the shape flags below override single values of it."""
    method: Annotated[MethodName, mark("method", before="record", effect="result")] = "record"
    """Named way of training that sets the defaults of the other flags: record (the original log's),
    fast, which reaches a loss in a fraction of the tokens, or portable, which is fast without the parts
    that `storylab export` cannot write."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data_dir: Annotated[
        Path, mark("data", effect="presentation", set_by="use [data], or --data_dir")
    ] = DEFAULT_DATA_DIR
    """Prepared data set (made by `storylab prepare`)."""
    out_dir: Annotated[
        Path | None, mark("record", effect="presentation", set_by="--runs says where runs go")
    ] = None
    """Run folder to write; by default runs/PRESET-DTYPE-DATE-TIME."""
    dtype: Annotated[Dtype, mark("precision")] = "bfloat16"
    """Precision of the matrix products; weights and optimizer stay float32. The fp8, mxfp8 and nvfp4
    kinds (fp4 and nvf4 are nvfp4) are recipes for the linear layers; the rest of the model is in
    bfloat16 then."""
    recipe: Annotated[str, mark("precision", before="")] = ""
    """Changes to the recipe of a low-precision dtype, such as "hadamard=false
    forward.weight.square=false high_last_share=0.25"."""
    backend: Annotated[Backend, mark("precision", before="auto")] = "auto"
    """Backend of a low-precision dtype: emulated (exact, any device, no faster), or the hardware
    through te (TransformerEngine), torchao or native (torch's own FP8 products; nothing to install);
    auto is emulated on a CPU and te on a GPU."""
    quantization_stats: Annotated[bool, mark("record", before=False, effect="presentation")] = False
    """Record errors, underflow, saturation and scales of every quantised tensor at evaluations."""
    max_iters: Annotated[int, mark("length", checks=COUNT_OR_NONE, effect="result")] = 1000
    """Number of the last iteration; iterations count from 0."""
    batch_size: Annotated[int, mark("batch", checks=COUNT)] = 64
    """Sequences in a micro-batch."""
    gradient_accumulation_steps: Annotated[int, mark("batch", checks=COUNT)] = 16
    """Micro-batches in an iteration."""
    block_size: Annotated[int, mark("sequence", checks=COUNT)] = 128
    """Tokens in a sequence."""
    learning_rate: Annotated[float, mark("schedule", checks=RATE, effect="result")] = 1e-4
    """Peak learning rate, reached at the end of the warm-up."""
    min_lr: Annotated[float, mark("schedule", checks=RATE, effect="result")] = 5e-5
    """Learning rate at the last iteration, under a schedule that decays."""
    warmup_iters: Annotated[
        int, mark("schedule", "length", checks=COUNT_OR_NONE, effect="result")
    ] = 1000
    """Iterations of linear warm-up from 0; 0 starts at the peak."""
    schedule: Annotated[ScheduleName, mark("schedule", effect="result")] = "cosine"
    """Course of the learning rate after the warm-up."""
    optimizer: Annotated[OptimizerName, mark("optimizer", before="adamw")] = "adamw"
    """adamw for everything, or for the matrices of the blocks muon or normuon and adamw for the rest."""
    muon_lr: Annotated[
        float,
        mark("optimizer", before=0.02, checks=RATE, effect="result", formerly="matrix_lr"),
    ] = 0.02
    """Peak learning rate of the matrices under muon and normuon; it follows the course of learning_rate."""
    weight_decay: Annotated[float, mark("optimizer", checks=RATE, effect="result")] = 0.1
    """Weight decay of matrices and embeddings; norm gains are not decayed."""
    beta1: Annotated[float, mark("optimizer", checks=DECAY, effect="result")] = 0.9
    """AdamW decay of the gradient average."""
    beta2: Annotated[float, mark("optimizer", checks=DECAY, effect="result")] = 0.999
    """AdamW decay of the squared-gradient average."""
    grad_clip: Annotated[float, mark("step", checks=NUMBER, effect="result")] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    on_divergence: Annotated[DivergencePolicy, mark("step", before="stop", effect="result")] = (
        "stop"
    )
    """Where loss or gradients are not finite: stop; skip the step; or rewind to the last evaluation and
    go on with the data after the fault. The run records each."""
    ema_fraction: Annotated[
        float,
        mark(
            "method",
            before=0.0,
            checks=SHARE,
            by_length="how far weights are averaged over",
            formerly="average_share",
        ),
    ] = 0.0
    """Evaluate, keep and sample from an exponential average of the weights that remembers about this
    share of the run, and all of it before that; the training itself does not see it. 0 for none."""
    eval_interval: Annotated[int, mark("evaluation", checks=COUNT, effect="result")] = 500
    """Iterations between evaluations."""
    eval_iters: Annotated[int, mark("evaluation", checks=COUNT, effect="result")] = 100
    """Batches of 64 fixed windows that an evaluation during training reads from each split."""
    log_interval: Annotated[int, mark("record", checks=COUNT, effect="presentation")] = 100
    """Iterations between printed lines."""
    checkpoint_minutes: Annotated[float, mark("record", checks=NUMBER, effect="presentation")] = (
        10.0
    )
    """Longest time between checkpoints, besides those at evaluations and at the end."""
    skip_checks: Annotated[bool, mark("record", before=False, effect="presentation")] = False
    """Begin without the checks before the first step (docs/guide/training.md); the run records it."""
    device: Annotated[str, mark("machine")] = "auto"
    """auto, cpu, cuda, cuda:1 or mps; auto takes CUDA if the machine has it, else the CPU."""
    parallel: Annotated[Parallel, mark("machine", before="ddp", effect="presentation")] = "ddp"
    """How several processes (torchrun) share a run: each has the whole model (ddp), or its share of the
    weights, gradients and optimizer state (fsdp). One process ignores it."""
    compile: Annotated[bool | None, mark("machine")] = None
    """Compile the blocks with torch.compile (needs a C++ compiler on the CPU); by default if the
    run is long enough to win the time back and not in low precision."""
    seed: Annotated[int, mark("seed", checks=SEED, effect="result", set_by="use seeds = [...]")] = (
        1337
    )
    """Seed of the initial weights."""
    data_seed: Annotated[
        int | None, mark("seed", checks=SEED, effect="result", set_by="use seeds = [...]")
    ] = None
    """Seed of the order of the training windows; by default the same as seed."""

    def __post_init__(self) -> None:
        check_fields(self)
        at_most(MOST, "tokens in an iteration", self.tokens_per_iteration)
        if self.model.residual_dtype == "bfloat16" and self.dtype in WIDENING_DTYPES:
            raise UserError(
                f"residual_dtype bfloat16 does not go with dtype {self.dtype}, whose products would widen "
                "the residual stream: leave one of the two out"
            )
        # The optimizer keeps the ratio of its rate to that of the run.
        own_rate = OPTIMIZERS[self.optimizer].rate_field
        if own_rate and not (
            self.learning_rate and getattr(self, own_rate) / self.learning_rate < float("inf")
        ):
            raise UserError(
                f"{self.optimizer} follows the course of learning_rate: let it be above 0, and not as "
                f"small as {self.learning_rate}"
            )

    def require_no_rise(self) -> None:
        """Raise a UserError if the learning rate would rise after the warm-up, as it does where only one
        of two flags was given. For new runs only; old runs may have it."""
        decays = SCHEDULES[self.schedule].decays and self.max_iters > self.warmup_iters
        if decays and self.min_lr > self.learning_rate:
            raise UserError(
                f"min_lr {self.min_lr:g} is above learning_rate {self.learning_rate:g}, so the rate would "
                "rise after its warm-up: give both"
            )

    @property
    def iterations(self) -> int:
        """Number of iterations; they count from 0 to ``max_iters``."""
        return self.max_iters + 1

    @property
    def total_tokens(self) -> int:
        """Tokens that the whole run trains on, those of a later epoch again."""
        return self.iterations * self.tokens_per_iteration

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens that one optimizer step trains on: by default 64 x 16 x 128, as in the original log."""
        return self.batch_size * self.gradient_accumulation_steps * self.block_size

    @property
    def resolved_data_seed(self) -> int:
        """Seed of the data order after the default has been applied."""
        return self.seed if self.data_seed is None else self.data_seed
