"""The command line: verbs, their flags, and one line for every mistake."""

from __future__ import annotations

import codecs
import dataclasses
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from storylab import __version__, lab_cli, plan_cli
from storylab.config import (
    DEFAULT_DATA_DIR,
    DEFAULT_PRESET,
    PRESETS,
    ModelConfig,
    PresetName,
    TrainConfig,
)
from storylab.errors import UserError, out_of_memory
from storylab.files import system_words
from storylab.flags import default_for, parse, vocab_size_or

RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
CheckpointName = Literal["last", "best"]

MOST_SAMPLES = 10_000
# What the system says of an output that nothing more goes into.
OUTPUT_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
SMALLER_STEPS = (
    "halve --batch_size and double --gradient_accumulation_steps, which trains on the same tokens, or "
    "take a smaller model"
)
# For verbs that train nothing, or nothing else than before.
MEMORY_REMEDIES = {
    "sample": "take fewer --samples, or a machine with more memory",
    "eval": "take a smaller --block_size, or a machine with more memory",
    **dict.fromkeys(
        ("resume", "prepare", "compare", "list", "watch"),
        "end other programs, or go on on a machine with more memory",
    ),
}
USAGE = """\
usage: storylab VERB [FLAGS]      (storylab VERB --help lists a verb's flags)

  prepare   turn stories into a data set to train on
  train     train a model; the defaults are the record's experiment 1
  resume    continue a run that was stopped, to the same bits
  eval      loss, perplexity and bits per byte of a run on a whole split
  sample    write stories with a run's model
  info      shape and parameter count of a model
  doctor    what this machine can run, and how fast

  experiment run FILE   train the arms of an experiment and compare them
  experiment new FILE   write the skeleton of an experiment file
  experiment report     write the log and the page of all experiments
  plan      what a run or an experiment will take, and what FP8 or NVFP4 can bring
  bench     speed, memory and where the time goes, for each precision and attention here
  compare   is one run better than another, by how much, and may they be compared
  noise     how much the loss moves with the seed alone
  list      the runs in a folder
  watch     experiments as they run

examples:
  storylab prepare --source builtin --tokenizer bpe:4096
  storylab train --preset nano --data_dir data/builtin-bpe4096 --out_dir runs/first
  storylab sample runs/first
"""


@dataclass(frozen=True)
class TrainCommand:
    """Train a model. The defaults are the record's: 113M parameters, 131,072 tokens an iteration.

    Without --data_dir the TinyStories data set is fetched from the hub and prepared first.

    Examples: storylab train --dtype bfloat16 --max_iters 1000
    | storylab train --preset 10m --data_dir data/files-gpt2 --out_dir runs/a
    | storylab train (the same flags) --out_dir runs/a --resume
    """

    config: TrainConfig = field(default_factory=TrainConfig)
    resume: bool = False
    """Continue the run in --out_dir; its config must be the same."""


@dataclass(frozen=True)
class ResumeCommand:
    """Continue a run that was stopped or killed; it ends with the bits of an uninterrupted one.

    Examples: storylab resume runs/a | storylab resume runs/a --max_iters 2000
    """

    run: RunFolder
    """Run folder."""
    max_iters: int | None = None
    """A new last iteration, where the learning rates so far stay the same (warm-up, constant) and nothing
    else goes by the length of the run."""
    data_dir: Path | None = None
    """Where the run's data set is now, if it has moved."""


@dataclass(frozen=True)
class EvalCommand:
    """Evaluate a run's model on a whole split: loss, perplexity, bits per byte, standard error.

    A loss holds for the length of the windows and for where they begin: compare like with like.

    Examples: storylab eval runs/a | storylab eval runs/a --checkpoint best --split train
    | storylab eval runs/a --block_size 512 --aligned
    """

    run: RunFolder
    """Run folder."""
    checkpoint: CheckpointName = "last"
    """The newest weights, or those with the best validation loss."""
    split: Literal["validation", "train"] = "validation"
    """Which stories."""
    block_size: int | None = None
    """Tokens in a window; by default as many as in training."""
    aligned: bool = False
    """Begin windows anew at every story, instead of running through all stories in turn."""
    data_dir: Path | None = None
    """Where the run's data set is now, if it has moved."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclass(frozen=True)
class SampleCommand:
    """Write stories with a run's model.

    Examples: storylab sample runs/a | storylab sample runs/a --prompt "Tom had a dog" --samples 4
    """

    run: RunFolder
    """Run folder."""
    prompt: str = "Once upon a time there was a little"
    """How the stories begin; empty, or <|endoftext|>, for the model to begin them."""
    samples: int = 1
    """Number of stories, written in one batch; the first one is shown as it grows."""
    max_new_tokens: int = 256
    """Longest continuation, in tokens."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Draw among this many most likely tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities sum to at least this."""
    seed: int = 0
    """Seed of the draws."""
    checkpoint: CheckpointName = "last"
    """The newest weights, or those with the best validation loss."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclass(frozen=True)
class InfoCommand:
    """Print the shape and the parameter count of a model.

    Examples: storylab info | storylab info --preset 113m | storylab info --preset 10m --n_layer 6
    """

    preset: PresetName = DEFAULT_PRESET
    """Named model shape; the shape flags change single values of it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    vocab_size: int = 0
    """Vocabulary to count with; 0: the one that the preset is named for."""


@dataclass(frozen=True)
class DoctorCommand:
    """Check this machine: devices, precisions, memory, and the speed of real training steps.

    Examples: storylab doctor | storylab doctor --presets 10m 113m | storylab doctor --precision
    """

    precision: bool = False
    """Test the low-precision recipes instead: which run here, on what, and how exactly."""

    presets: tuple[PresetName, ...] = ("nano", "10m", "113m")
    """Models to time a few micro-batches of."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 2 for bad input, 128 + n when signal n stopped it."""
    args = list(sys.argv[1:] if argv is None else argv)
    remedy = MEMORY_REMEDIES.get(args[0] if args else "", SMALLER_STEPS)
    return guarded(lambda: _run_verb(args), remedy)


def guarded(work: Callable[[], int], memory_remedy: str = SMALLER_STEPS) -> int:
    """Run ``work``; one line on standard error and an exit code for what users can meet."""
    _open_output()
    try:
        code = work()
        sys.stdout.flush()  # here, so that a full disk is told of
        return code
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted")
        return 130
    except BrokenPipeError:
        _discard_output()  # the reader of a pipe has left
        return 141
    except OSError as error:
        if error.filename is None and error.errno in OUTPUT_FAULTS:
            _discard_output()
            return _fail(f"cannot write the output: {error.strerror}")
        named = error.filename is not None
        return _fail(f"cannot use {system_words(error)}" if named else system_words(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return _fail(f"out of memory: {memory_remedy}")


def _fail(message: str) -> int:
    # A name may hold a line break, and a message is one line.
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    print(f"storylab: {line}", file=sys.stderr)
    return 2


def _open_output() -> None:
    """Let everything be printed: characters that the terminal lacks are replaced, and what is meant for an
    output that is closed goes nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Takes the lowest free descriptor, the closed one, before a file of ours does.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as we run
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _discard_output() -> None:
    """Keep Python from complaining at its exit that what was printed cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run_verb(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"storylab {__version__}")
        return 0
    verb, args = words[0], list(words[1:])
    verbs: dict[str, Callable[[list[str]], int]] = {
        "prepare": _prepare,
        "train": train_command,
        "resume": _resume,
        "eval": _eval,
        "sample": _sample,
        "experiment": lab_cli.experiment,
        "plan": plan_cli.plan,
        "bench": plan_cli.bench,
        "compare": lab_cli.compare,
        "noise": lab_cli.noise,
        "list": lab_cli.list_runs,
        "watch": lab_cli.watch,
        "info": _info,
        "doctor": _doctor,
    }
    if verb not in verbs:
        raise UserError(f"unknown verb '{verb}': use one of {', '.join(verbs)}")
    return verbs[verb](args)


def _prepare(args: list[str]) -> int:
    from storylab.data.prepare import PrepareConfig, prepare

    config = parse(PrepareConfig, args, "storylab prepare")
    _prepare_and_print(config, prepare)
    return 0


def _prepare_and_print(config: Any, prepare: Callable[..., Any]) -> None:
    from storylab.console import ConsoleReporter

    with ConsoleReporter(count=False) as reporter:
        dataset = prepare(config, reporter.progress)
        for line in describe_dataset(dataset.folder, dataset.manifest):
            reporter.line(line)


def describe_dataset(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """A prepared data set in a few lines."""
    rows = [
        f"{name + ':':<12} {s['stories']:,} stories, {s['tokens']:,} tokens, "
        f"{s['text_bytes']:,} bytes, {s['duplicate_stories']:,} duplicate stories"
        for name, s in manifest["splits"].items()
    ]
    overlap = manifest["overlap"]
    fate = "left out of train" if overlap["left_out"] else "kept in train"
    tokenizer = manifest["tokenizer"]
    return [
        f"{folder}: {tokenizer['name']} tokenizer, {tokenizer['vocab_size']:,} ids in "
        f"{manifest['dtype']}",
        *rows,
        f"overlap:     {overlap['train_stories_in_validation']:,} train stories are in "
        f"validation ({fate})",
        *_reading_lines(manifest),
        f"fingerprint: {manifest['fingerprint']}",
    ]


def _reading_lines(manifest: dict[str, Any]) -> list[str]:
    """What reading changed or left out, for each split; data sets of earlier versions do not tell."""
    from storylab.data.tally import Tally

    return [
        f"{name + ':':<12} {line}"
        for name, counts in manifest.get("reading", {}).items()
        for line in Tally.from_dict(counts).lines()
    ]


def train_command(args: list[str], prog: str = "storylab train") -> int:
    """``storylab train``, and ``train_tinystories.py``."""
    default = TrainCommand(default_for(args))
    command = parse(TrainCommand, args, prog, default)
    config = command.config
    if command.resume:
        if config.out_dir is None:
            raise UserError("--resume needs --out_dir RUN: the run folder to continue")
        from storylab.training.resume import resume

        folder = config.out_dir
        return _watch(lambda reporter: resume(folder, config, reporter))
    if config.data_dir == DEFAULT_DATA_DIR and not DEFAULT_DATA_DIR.exists():
        from storylab.data.prepare import PrepareConfig, prepare
        from storylab.training.loop import resolve

        resolve(config)  # what cannot run is told before a gigabyte is fetched for it
        _prepare_and_print(PrepareConfig(), prepare)
    from storylab.training.loop import train

    return _watch(lambda reporter: train(config, reporter))


def _watch(work: Callable[[Any], Any]) -> int:
    """Train under a console reporter; the exit code tells how it ended."""
    from storylab.console import ConsoleReporter
    from storylab.training.loop import TrainingDiverged, TrainingInterrupted

    try:
        with ConsoleReporter() as reporter:
            run = work(reporter)
            reporter.line("")
            reporter.line(f"Run folder: {run.folder}")
    except TrainingInterrupted as stop:
        print(f"storylab: {stop}", file=sys.stderr)
        return 128 + stop.signal_number
    except TrainingDiverged as stop:
        print(f"storylab: {stop}", file=sys.stderr)
        return 1
    return 0


def _resume(args: list[str]) -> int:
    command = parse(ResumeCommand, args, "storylab resume")
    from storylab.record.folder import open_run
    from storylab.training.resume import resume

    config = open_run(command.run).read_config()
    changes: dict[str, Any] = {}
    if command.max_iters is not None:
        changes["max_iters"] = command.max_iters
    if command.data_dir is not None:
        changes["data_dir"] = command.data_dir
    wanted = dataclasses.replace(config, **changes)
    return _watch(lambda reporter: resume(command.run, wanted, reporter))


def _eval(args: list[str]) -> int:
    command = parse(EvalCommand, args, "storylab eval")
    from storylab.console import ConsoleReporter
    from storylab.training.evaluation import evaluate_run
    from storylab.training.lines import windows_words

    with ConsoleReporter() as reporter:
        result = evaluate_run(
            command.run,
            command.checkpoint,
            command.split,
            command.data_dir,
            command.device,
            lambda done, total: reporter.progress("evaluating", done, total),
            command.block_size,
            command.aligned,
        )
    print(f"read in        {windows_words(result.block_size, command.aligned)}")
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"standard error {result.standard_error:.4f} over {len(result.story_losses):,} stories")
    print(f"perplexity     {result.perplexity:,.2f}")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    return 0


def _sample(args: list[str]) -> int:
    command = parse(SampleCommand, args, "storylab sample")
    if command.samples > MOST_SAMPLES:
        raise UserError(f"samples is {command.samples}: it must be at most {MOST_SAMPLES:,}")
    from storylab.model.generate import Sampling
    from storylab.record.folder import open_run
    from storylab.training.lines import printable
    from storylab.training.sampling import as_in_stories, load_story_model

    sampling = Sampling(command.temperature, command.top_k, command.top_p, command.seed)
    writer = load_story_model(open_run(command.run), command.checkpoint, command.device)
    prompt = as_in_stories(command.prompt)
    if command.prompt.endswith(" "):
        print(
            "storylab: the space at the end of the prompt is left out: in stories it belongs to the word "
            "after it",
            file=sys.stderr,
        )
    # Characters may span tokens, so bytes are decoded as they come, for each story apart.
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(command.samples)]
    stories = [prompt] * command.samples
    stream = writer.stream(prompt, sampling, command.max_new_tokens, command.samples)
    print(prompt, end="", flush=True)
    for pieces in stream:
        new = [d.decode(piece) for d, piece in zip(decoders, pieces, strict=True)]
        stories = [story + text for story, text in zip(stories, new, strict=True)]
        print(printable(new[0]), end="", flush=True)
    print()
    for story in stories[1:]:
        print(f"\n---\n\n{printable(story)}")
    return 0


def _info(args: list[str]) -> int:
    preset = default_for(args)
    default = InfoCommand(preset.preset, preset.model)
    command = parse(InfoCommand, args, "storylab info", default)
    model = command.model
    vocab_size = vocab_size_or(command.vocab_size, PRESETS[command.preset].vocab_size)
    for f in dataclasses.fields(model):
        value = getattr(model, f.name)
        print(f"{f.name:<12} {value if isinstance(value, str) else f'{value:,}'}")
    print(f"{'head size':<12} {model.head_size}")
    windows = ", ".join("full" if w is None else str(w) for w in model.layer_windows)
    print(f"{'windows':<12} {windows} (receptive field: {model.receptive_field or 'all'})")
    print(f"{'vocabulary':<12} {vocab_size:,}")
    print(f"{model.parameter_count(vocab_size):,} parameters")
    return 0


def _doctor(args: list[str]) -> int:
    command = parse(DoctorCommand, args, "storylab doctor")
    from storylab.doctor import examine, examine_precision

    device = command.device
    lines = examine_precision(device) if command.precision else examine(device, command.presets)
    for line in lines:
        print(line, flush=True)
    return 0
