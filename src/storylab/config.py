"""The typed config of a run, the model presets, and their checks.

This module is imported before torch so that ``--help`` and bad flags answer at once. The flags of
``storylab train``, their help, the documentation table and ``config.json`` in the run folder are
all made from :class:`TrainConfig`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from storylab.decode import convert, is_unicode, shown
from storylab.errors import UserError

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
WIDE_DTYPES = ("float32", "bfloat16", "float16")
Backend = Literal["auto", "emulated", "te", "torchao"]
ScheduleName = Literal["cosine", "linear", "constant"]
OptimizerName = Literal["adamw", "muon", "normuon"]
ValueResidual = Literal["none", "first_layer", "token_table"]
MethodName = Literal["record", "fast"]
PresetName = Literal["nano", "3m", "6m", "10m", "50m", "113m", "200m", "350m"]

Name = TypeVar("Name", bound=str)

GPT2_VOCAB_SIZE = 50257
SMALL_VOCAB_SIZE = 4096
# More than any machine counts to; products of two still fit into a float, sums into 64 bits.
MOST = 10**15
# About what a float32 holds.
LARGEST_RATE = 1e38
# Caps between which a float32 tells logits apart.
SOFTCAPS = (1e-3, 1e6)
# Layers are built one by one.
MOST_LAYERS = 10_000


def _at_least(minimum: float, name: str, value: float) -> None:
    # "not >=" rather than "<" so that NaN is refused too.
    if not value >= minimum or value == float("inf"):
        raise UserError(
            f"{name} is {shown(value)}: it must be a finite number of at least {minimum}"
        )


def at_most(maximum: int, name: str, value: int) -> None:
    """Raise a UserError if a whole number is over ``maximum``."""
    if value > maximum:
        raise UserError(f"{name} is {shown(value)}: it must be at most {maximum:,}")


def check_seed(name: str, value: int) -> None:
    """Raise a UserError unless ``value`` is a seed that torch takes."""
    if not 0 <= value < 2**63:
        raise UserError(f"{name} is {shown(value)}: it must be from 0 to 2^63 - 1")


def parse_attention(pattern: str) -> tuple[int | None, ...]:
    """The windows that an attention pattern names, e.g. ``window:64*2,full`` -> (64, 64, None).

    Raises:
        UserError: it is not a pattern.
    """
    windows: list[int | None] = []
    for part in pattern.split(","):
        found = re.fullmatch(r"\s*(?:full|window:([1-9]\d{0,8}))(?:\*([1-9]\d{0,2}))?\s*", part)
        if not found:
            raise UserError(
                f"attention pattern '{pattern}' has '{part}': write full or window:N, or a list "
                "for the layers in turn such as window:64*3,full"
            )
        window = int(found[1]) if found[1] else None
        windows += [window] * int(found[2] or 1)
    return tuple(windows)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer (Llama architecture: RMSNorm, rotary positions, SwiGLU, tied head)."""

    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Query heads; the head size is n_embd / n_head."""
    n_kv_head: int = 3
    """Key/value heads (grouped-query attention); divides n_head."""
    n_embd: int = 768
    """Width of the residual stream."""
    n_hidden: int = 2048
    """Width of the SwiGLU hidden layer."""
    rope_base: float = 10000.0
    """Base of the rotary position frequencies."""
    attention: str = "full"
    """full, or window:N for a sliding window of N positions; a list such as window:64*3,full is
    dealt out to the layers in turn (here every fourth one is full)."""
    zero_init: bool = False
    """Start the two projections of a block that write to the residual stream at zero."""
    qk_norm: bool = False
    """Bring queries and keys of every head to a root mean square of 1 (Henry et al. 2020, arXiv
    2010.04245)."""
    softcap: float = 0.0
    """Bound of the logits, softcap * tanh(logit / softcap); 0 for none."""
    embedding_norm: bool = False
    """Bring token embeddings to a root mean square of 1 before the first block."""
    embedding_residual: bool = False
    """Feed every block a learned sum of the residual stream and the embeddings it began with."""
    value_residual: ValueResidual = "none"
    """What every layer adds to its attention values, by a learned scale: nothing, the values of the
    first layer (Zhou et al. 2024, arXiv 2410.17897), or a vector of the token's from a table that
    all layers share."""
    bigram_rows: int = 0
    """Rows of a table of embeddings for pairs of neighbouring tokens, found by a hash; 0 for none."""

    def __post_init__(self) -> None:
        parse_attention(self.attention)
        for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden"):
            _at_least(1, name, getattr(self, name))
            at_most(MOST_LAYERS if name == "n_layer" else MOST, name, getattr(self, name))
        _at_least(1, "rope_base", self.rope_base)
        for name in ("softcap", "bigram_rows"):
            _at_least(0, name, getattr(self, name))
        at_most(MOST, "bigram_rows", self.bigram_rows)
        if self.softcap and not SOFTCAPS[0] <= self.softcap <= SOFTCAPS[1]:
            raise UserError(
                f"softcap is {self.softcap}: it must be 0 for none, or from {SOFTCAPS[0]:g} to "
                f"{SOFTCAPS[1]:g}"
            )
        if self.n_embd % self.n_head or self.head_size % 2:
            raise UserError(
                f"n_embd {self.n_embd} / n_head {self.n_head} must be an even whole number "
                "(the head size): change one of the two"
            )
        if self.n_head % self.n_kv_head:
            raise UserError(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}: "
                "query heads share key/value heads in equal groups"
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def qkv_size(self) -> int:
        """Features of queries, keys and values together."""
        return (self.n_head + 2 * self.n_kv_head) * self.head_size

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Positions that each layer's queries read, their own included; None: all before them."""
        pattern = parse_attention(self.attention)
        return tuple(pattern[layer % len(pattern)] for layer in range(self.n_layer))

    def adds_values(self, layer: int) -> bool:
        """Whether ``layer`` adds to its attention values, see ``value_residual``."""
        return self.value_residual == "token_table" or (
            self.value_residual == "first_layer" and layer > 0
        )

    @property
    def receptive_field(self) -> int | None:
        """Positions that can influence an output through all layers; None: all before it."""
        reach = 1
        for window in self.layer_windows:
            if window is None:
                return None
            reach += window - 1
        return reach

    def parameter_count(self, vocab_size: int) -> int:
        """Number of trained parameters with a vocabulary of ``vocab_size`` (the head is tied)."""
        attention = 2 * self.n_embd * (self.n_head + self.n_kv_head) * self.head_size
        feed_forward = 3 * self.n_embd * self.n_hidden
        block = attention + feed_forward + 2 * self.n_embd
        scales = sum(self.adds_values(layer) for layer in range(self.n_layer))
        scales += 2 * self.n_layer * self.embedding_residual
        tables = (vocab_size + self.bigram_rows) * self.n_embd
        if self.value_residual == "token_table":
            tables += vocab_size * self.n_kv_head * self.head_size
        return tables + self.n_layer * block + self.n_embd + scales


@dataclass(frozen=True)
class Preset:
    """A named model shape and the vocabulary with which it has the parameters that its name says."""

    model: ModelConfig
    vocab_size: int


# Head size 64 throughout and the record's four query heads to one key/value head where the head
# count allows it. Below 50M a 50,257-word vocabulary would leave hardly anything for the blocks,
# so these shapes are counted with a 4,096-token vocabulary (`prepare --tokenizer bpe:4096`).
PRESETS: dict[PresetName, Preset] = {
    "nano": Preset(ModelConfig(3, 2, 1, 128, 288), SMALL_VOCAB_SIZE),
    "3m": Preset(ModelConfig(6, 3, 1, 192, 480), SMALL_VOCAB_SIZE),
    "6m": Preset(ModelConfig(7, 4, 1, 256, 704), SMALL_VOCAB_SIZE),
    "10m": Preset(ModelConfig(12, 4, 1, 256, 768), SMALL_VOCAB_SIZE),
    "50m": Preset(ModelConfig(8, 8, 2, 512, 1536), GPT2_VOCAB_SIZE),
    "113m": Preset(ModelConfig(12, 12, 3, 768, 2048), GPT2_VOCAB_SIZE),
    "200m": Preset(ModelConfig(14, 16, 4, 1024, 2560), GPT2_VOCAB_SIZE),
    "350m": Preset(ModelConfig(27, 16, 4, 1024, 2752), GPT2_VOCAB_SIZE),
}
DEFAULT_PRESET: PresetName = "113m"
# Named ways of training: what each changes of the record's. Every part of `fast` has been held against runs
# without it (docs/time-to-loss.md).
METHODS: dict[MethodName, dict[str, Any]] = {
    "record": {},
    "fast": {
        "optimizer": "normuon",
        "matrix_lr": 0.02,
        "learning_rate": 4e-2,
        "min_lr": 8e-3,
        "warmup_iters": 20,
        "schedule": "linear",
        "beta2": 0.95,
        "average_share": 0.1,
        "model": {
            "qk_norm": True,
            "value_residual": "first_layer",
            "embedding_residual": True,
        },
    },
}
DEFAULT_DATA_DIR = Path("data/tinystories-gpt2")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are the record's: 113M parameters, 131,072 tokens an iteration."""

    preset: PresetName = DEFAULT_PRESET
    """Named model shape; the shape flags below change single values of it."""
    method: MethodName = "record"
    """Named way of training that the other flags start from: the record's, or fast, which reaches a loss
    in a fraction of the tokens."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data_dir: Path = DEFAULT_DATA_DIR
    """Prepared data set (made by `storylab prepare`)."""
    out_dir: Path | None = None
    """Run folder to write; by default runs/PRESET-DTYPE-DATE-TIME."""
    dtype: Dtype = "bfloat16"
    """Precision of the matrix products; weights and optimizer stay float32. The fp8, mxfp8 and nvfp4
    kinds (fp4 and nvf4 are nvfp4) are recipes for the linear layers; the rest of the model is in
    bfloat16 then."""
    recipe: str = ""
    """Changes to the recipe of a low-precision dtype, such as "hadamard=false
    forward.weight.square=false high_last_share=0.25"."""
    backend: Backend = "auto"
    """What computes a low-precision dtype: emulated (exact, any device, no faster), or the hardware
    through te (TransformerEngine) or torchao; auto is emulated on a CPU and te on a GPU."""
    quantization_stats: bool = False
    """Record errors, underflow, saturation and scales of every quantised tensor at evaluations."""
    max_iters: int = 1000
    """Number of the last iteration; iterations count from 0."""
    batch_size: int = 64
    """Sequences in a micro-batch."""
    gradient_accumulation_steps: int = 16
    """Micro-batches in an iteration."""
    block_size: int = 128
    """Tokens in a sequence."""
    learning_rate: float = 1e-4
    """Peak learning rate, reached at the end of the warm-up."""
    min_lr: float = 5e-5
    """Learning rate at the last iteration (cosine and linear schedules)."""
    warmup_iters: int = 1000
    """Iterations of linear warm-up from 0; 0 starts at the peak."""
    schedule: ScheduleName = "cosine"
    """Course of the learning rate after the warm-up."""
    optimizer: OptimizerName = "adamw"
    """adamw for everything, or for the matrices of the blocks muon or normuon and adamw for the rest."""
    matrix_lr: float = 0.02
    """Peak learning rate of the matrices under muon and normuon; it follows the course of learning_rate."""
    cautious_decay: bool = False
    """Under muon and normuon, decay an entry only where its update makes it smaller too."""
    weight_decay: float = 0.1
    """Weight decay of matrices and embeddings; norm gains are not decayed."""
    beta1: float = 0.9
    """AdamW decay of the gradient average."""
    beta2: float = 0.999
    """AdamW decay of the squared-gradient average."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    average_share: float = 0.0
    """Evaluate, keep and sample from an exponential average of the weights that remembers about this
    share of the run, and all of it before that; the training itself does not see it. 0 for none."""
    short_share: float = 0.0
    """Share of the run, from its start, in which every window is trained on as two of half the length
    (Li et al. 2021, arXiv 2108.06084)."""
    eval_interval: int = 500
    """Iterations between evaluations."""
    eval_iters: int = 100
    """Batches of 64 fixed windows that an evaluation during training reads from each split."""
    log_interval: int = 100
    """Iterations between printed lines."""
    checkpoint_minutes: float = 10.0
    """Longest time between checkpoints, besides those at evaluations and at the end."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps; auto takes CUDA where there is one, else the CPU."""
    compile: bool | None = None
    """Compile the blocks with torch.compile (needs a C++ compiler on the CPU); by default where the
    run is long enough to win the time back, but not in low precision."""
    seed: int = 1337
    """Seed of the initial weights."""
    data_seed: int | None = None
    """Seed of the order of the training windows; by default the same as seed."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "gradient_accumulation_steps",
            "block_size",
            "eval_interval",
            "eval_iters",
            "log_interval",
        ):
            _at_least(1, name, getattr(self, name))
            at_most(MOST, name, getattr(self, name))
        at_most(MOST, "tokens in an iteration", self.tokens_per_iteration)
        for name in ("max_iters", "warmup_iters"):
            at_most(MOST, name, getattr(self, name))
        for name in (
            "max_iters",
            "warmup_iters",
            "learning_rate",
            "min_lr",
            "matrix_lr",
            "weight_decay",
            "grad_clip",
            "checkpoint_minutes",
        ):
            _at_least(0, name, getattr(self, name))
        for name in ("learning_rate", "min_lr", "matrix_lr", "weight_decay"):
            if getattr(self, name) > LARGEST_RATE:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at most 1e38")
        for name in ("seed", "resolved_data_seed"):
            check_seed(name.removeprefix("resolved_"), getattr(self, name))
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be in [0, 1)")
        for name in ("average_share", "short_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be a share, 0 to 1")
        if self.short_share and self.block_size % 2:
            raise UserError(
                f"block_size {self.block_size} cannot be halved, as short_share asks: make it even"
            )
        # The ratio of the two rates is what the optimizer keeps.
        tiny = not self.learning_rate or self.matrix_lr / self.learning_rate == float("inf")
        if self.optimizer != "adamw" and tiny:
            raise UserError(
                f"{self.optimizer} follows the course of learning_rate: let it be above 0, and not as "
                f"small as {self.learning_rate}"
            )

    def require_no_rise(self) -> None:
        """Raise a UserError if the learning rate would rise after the warm-up, as it does where only one
        of two flags was given. For new runs: old ones are what they are."""
        decays = self.schedule != "constant" and self.max_iters > self.warmup_iters
        if decays and self.min_lr > self.learning_rate:
            raise UserError(
                f"min_lr {self.min_lr:g} is above learning_rate {self.learning_rate:g}, so the rate would "
                "rise after its warm-up: give both"
            )

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens that one optimizer step trains on: the record's 64 x 16 x 128 by default."""
        return self.batch_size * self.gradient_accumulation_steps * self.block_size

    @property
    def resolved_data_seed(self) -> int:
        """Seed of the data order after the default has been applied."""
        return self.seed if self.data_seed is None else self.data_seed


def preset_config(name: str, method: str = "record") -> TrainConfig:
    """The default run with the model shape of preset ``name``, trained by ``method``.

    Raises:
        UserError: no preset or method has that name.
    """
    preset = _named(PRESETS, name, "preset")
    chosen = _named(METHODS, method, "method")
    changes = dict(METHODS[chosen])
    model = dataclasses.replace(PRESETS[preset].model, **changes.pop("model", {}))
    return TrainConfig(preset=preset, method=chosen, model=model, **changes)


def _named(table: dict[Name, Any], name: str, kind: str) -> Name:
    for key in table:
        if key == name:
            return key
    raise UserError(f"unknown {kind} '{name}': choose one of {', '.join(table)}")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as plain JSON values; the inverse of :func:`from_dict`."""
    values = dataclasses.asdict(config)
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Rebuild a config that :func:`to_dict` made.

    Raises:
        UserError: a field is unknown, missing or of another type, for instance in a run of another
            version.
    """
    if not isinstance(values, dict) or not isinstance(values.get("model", {}), dict):
        raise UserError("the run's config is damaged: it or its model is not an object")
    names, given = {f.name for f in dataclasses.fields(TrainConfig)}, values.keys()
    values = ADDED_FIELDS | values
    if "backend" not in given and values.get("dtype") not in WIDE_DTYPES:
        values["backend"] = "emulated"  # before there was a choice
    odd = set(values) ^ names
    if not odd:
        model = ADDED_MODEL_FIELDS | values["model"]
        odd = {
            f"model.{name}"
            for name in set(model) ^ {f.name for f in dataclasses.fields(ModelConfig)}
        }
    if odd:
        raise UserError(
            f"the run's config does not fit this version of storylab (fields: {', '.join(sorted(odd))})"
        )
    for name, value in (values | model).items():
        # Names of folders alone may have bytes that are not Unicode.
        if name not in ("data_dir", "out_dir") and isinstance(value, str) and not is_unicode(value):
            raise UserError(f"the run's config is damaged: {name}: is not Unicode text")
    values["out_dir"] = values["out_dir"] or None
    return convert(TrainConfig, values | {"model": model}, "the run's config")


# Fields that say where and how often to look, not what is computed: a resumed run may change them.
PRESENTATION_FIELDS = (
    "data_dir",
    "out_dir",
    "log_interval",
    "checkpoint_minutes",
    "quantization_stats",
)
# Fields that the first runs did not have, and what those runs did. A run whose value is this one has
# the name that it had then.
ADDED_FIELDS: dict[str, Any] = {
    "recipe": "",
    "backend": "auto",
    "quantization_stats": False,
    "method": "record",
    "optimizer": "adamw",
    "matrix_lr": 0.02,
    "cautious_decay": False,
    "average_share": 0.0,
    "short_share": 0.0,
}
# The same for fields of the model's shape.
ADDED_MODEL_FIELDS: dict[str, Any] = {
    "zero_init": False,
    "qk_norm": False,
    "softcap": 0.0,
    "embedding_norm": False,
    "embedding_residual": False,
    "value_residual": "none",
    "bigram_rows": 0,
}


def differences(a: TrainConfig, b: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that decide the result and differ between ``a`` and ``b``, as name -> (a's, b's)."""
    left, right = _flat(a), _flat(b)
    return {name: (left[name], right[name]) for name in left if left[name] != right[name]}


def _flat(config: TrainConfig) -> dict[str, Any]:
    values = to_dict(config)
    values["data_seed"] = config.resolved_data_seed
    values.update(values.pop("model"))
    return {k: v for k, v in values.items() if k not in PRESENTATION_FIELDS}
