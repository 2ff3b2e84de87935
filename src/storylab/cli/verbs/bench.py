"""``storylab bench``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from storylab.cli.registry import Call, Verb
from storylab.config import PRESETS, Dtype, TrainConfig
from storylab.errors import UserError
from storylab.flags import default_for, given_flags, vocab_size_or


@dataclass(frozen=True)
class BenchCommand:
    """Time training steps on this machine in every precision and attention pattern: tok/s, share of
    the GPU's peak, memory, energy, and the time of each part of a step. No file is written.

    On a CPU a micro-batch is 8 sequences here unless --batch_size says otherwise, and the time of a
    low-precision dtype is that of its emulation.

    Examples: storylab bench --preset 10m | storylab bench --dtypes bfloat16 float32 --compile
    """

    dtypes: tuple[Dtype, ...] = ("bfloat16", "float32", "fp8", "mxfp8", "nvfp4")
    """Precisions to time."""
    attentions: tuple[str, ...] = ("window:64",)
    """Attention patterns to time in bfloat16, in addition to the model's own."""
    seconds: float = 40.0
    """Time for steps, shared by all; starting, warming up and profiling come on top."""
    vocab_size: int = 0
    """Vocabulary size; 0: the one that the preset's parameter count assumes."""
    config: TrainConfig = field(default_factory=TrainConfig)


def run(call: Call) -> int:
    """Time training steps and print a table."""
    command = call.parse(BenchCommand, BenchCommand(config=default_for(call.args)))
    from storylab.planning.bench import CPU_SEQUENCES, bench_lines, variants
    from storylab.training.precision import choose_device

    config = command.config
    if not 0 < command.seconds < float("inf"):
        raise UserError(f"seconds is {command.seconds}: it must be a finite number above 0")
    if not command.dtypes:
        raise UserError("give at least one of --dtypes")
    given = given_flags(call.args)
    if "dtype" in given:
        raise UserError("a bench has --dtypes, one or more, instead of --dtype")
    device = choose_device(config.device)
    if device.type == "cpu" and "batch_size" not in given:
        config = dataclasses.replace(config, batch_size=CPU_SEQUENCES)
    config = dataclasses.replace(config, compile=bool(config.compile))
    vocab_size = vocab_size_or(command.vocab_size, PRESETS[config.preset].vocab_size)
    print(
        f"{config.preset} on {device}: steps of one micro-batch, {config.batch_size} x "
        f"{config.block_size} tokens, {vocab_size:,} ids, the update included"
    )
    configs = list(variants(config, command.dtypes, command.attentions))
    for line in bench_lines(configs, vocab_size, command.seconds, call.executor):
        print(line, flush=True)
    return 0


VERB = Verb(
    "bench",
    "speed and memory of training here, for each precision and attention pattern",
    "experiments",
    run,
    BenchCommand,
    position=5,
)
