"""Flags to typed values, by tyro, with every mistake in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from storylab.config import (
    DEFAULT_PRESET,
    FORMER_NAMES,
    LAST_WITH_REMOVED,
    REMOVED_FIELDS,
    ModelConfig,
    TrainConfig,
    at_most,
    current_name,
    preset_config,
)
from storylab.errors import UserError

T = TypeVar("T")
# Ids are stored in 32 bits at most.
MOST_IDS = 2**32
LONGEST_LINE = 10_000
# Names that other programs of the field have for a flag.
USUAL_NAMES = {
    "learning_rate": "lr peak_lr max_lr",
    "min_lr": "lr_min min_learning_rate",
    "schedule": "lr_scheduler lr_scheduler_type scheduler",
    "warmup_iters": "warmup warmup_steps num_warmup_steps",
    "max_iters": "iters steps max_steps num_steps num_iterations train_steps lr_decay_iters epochs "
    "num_epochs num_train_epochs",
    "batch_size": "bs micro_batch_size device_batch_size per_device_train_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps accumulate_grad_batches",
    "block_size": "context context_length seq_len seq_length sequence_length max_seq_len",
    "weight_decay": "wd",
    "grad_clip": "max_grad_norm grad_norm clip_grad gradient_clip_val",
    "beta1": "adam_beta1 beta_1",
    "beta2": "adam_beta2 beta_2",
    "ema_fraction": "ema ema_decay",
    "preset": "model model_size",
    "n_layer": "layers n_layers num_layers num_hidden_layers",
    "n_head": "heads n_heads num_heads num_attention_heads",
    "n_kv_head": "n_kv_heads num_key_value_heads",
    "n_embd": "dim d_model width hidden_size",
    "n_hidden": "d_ff intermediate_size",
    "rope_base": "rope_theta",
    "attention": "window sliding_window",
    "dtype": "precision amp",
    "eval_interval": "eval_every eval_steps",
    "log_interval": "log_every logging_steps",
    "out_dir": "output_dir save_dir run_dir",
    "data_dir": "data dataset",
    "prompt": "start",
    "samples": "num_samples",
    "max_new_tokens": "max_tokens max_length length",
    "temperature": "temp",
    "checkpoint": "ckpt",
}
_FLAGS_BY_NAME = {name: flag for flag, names in USUAL_NAMES.items() for name in names.split()}

# An empty argument as a path: no file has this name, while that of Path("") is the current folder.
EMPTY_PATH = Path("\0")


def parse(
    kind: type[T],
    args: Sequence[str],
    prog: str,
    default: T | None = None,
    advice: str | None = None,
) -> T:
    """Build ``kind`` from flags; ``--max_iters`` and ``--max-iters`` are the same flag.

    A renamed field also has a flag with its former name, which a line on standard error mentions.

    Raises:
        UserError: a flag or value is wrong; the text of the parser's message in one line.
        SystemExit: ``--help`` was printed.
    """
    args = _with_current_names(args, _flag_names(kind))
    errors = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(errors), _unbroken_lines(args):
            command = tyro.cli(
                kind,
                args=_switches(kind, args),
                prog=prog,
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=_registry(),
                **options,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _one_line(errors.getvalue(), _flag_names(kind))
        raise UserError(f"{message}; {advice or f'see {prog} --help'}") from None
    for name in _empty_paths(command):
        flag = f"--{name}" if name in given_flags(args) else name.upper()
        raise UserError(f"{flag} has an empty path: give one (a variable that is not set is empty)")
    return command


def _with_current_names(args: Sequence[str], known: Collection[str]) -> Sequence[str]:
    """Respell flags that have the former name of a field among ``known``, with a line for each.

    Raises:
        UserError: the former and the current name are both there.
    """
    given = _given_names(args)
    for old, new in FORMER_NAMES.items():
        if old in given and new in known:
            if new in given:
                raise UserError(f"--{new} is given twice, as --{old} and as --{new}")
            print(f"storylab: --{old} is now --{new}", file=sys.stderr)
            flag = rf"\A--(no[-_])?{old.replace('_', '[-_]')}(?==|\Z)"
            args = [re.sub(flag, rf"--\g<1>{new}", arg) for arg in args]
    return args


def _registry() -> ConstructorRegistry:
    """The parser's types, which distinguish an empty path from the current folder."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda args: Path(args[0]) if args[0] else EMPTY_PATH,
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _empty_paths(command: Any) -> Iterator[str]:
    """Names of the fields that hold an empty path."""
    for f in dataclasses.fields(command):
        value = getattr(command, f.name)
        if dataclasses.is_dataclass(value):
            yield from _empty_paths(value)
        elif value == EMPTY_PATH or (isinstance(value, tuple) and EMPTY_PATH in value):
            yield f.name


@contextlib.contextmanager
def _unbroken_lines(args: Sequence[str]) -> Iterator[None]:
    """Let the parser write a message in one line: otherwise it wraps messages at the terminal's
    width, even within a number. Help is still wrapped."""
    before = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(args):
        os.environ["COLUMNS"] = str(LONGEST_LINE)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def _switches(kind: type[Any], args: Sequence[str]) -> list[str]:
    """Respell ``--flag``, ``--no_flag``, ``--flag=False`` and ``--flag False`` (nanoGPT's forms) as
    the parser expects them: a value for a switch that may be left open, else ``--no_flag``."""
    names, rest, result = _switch_names(kind), deque(args), []
    while rest:
        arg = rest.popleft()
        flag, _, value = arg.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        negated = name.startswith("no_") and not value
        name = name.removeprefix("no_") if negated else name
        if not flag.startswith("--") or name not in names:
            result.append(arg)
            continue
        if not value and not negated and rest and rest[0].lower() in ("true", "false"):
            value = rest.popleft()
        spelled = {"": not negated, "true": True, "false": False}.get(value.lower())
        if spelled is None:
            result.append(arg)
        elif names[name]:
            result += [f"--{name}", str(spelled)]
        else:
            result.append(f"--{name}" if spelled else f"--no_{name}")
    return result


def _switch_names(kind: type[Any]) -> dict[str, bool]:
    """Names of the fields that are switches, and whether they may be left open (None)."""
    names: dict[str, bool] = {}
    for name, hint in get_type_hints(kind).items():
        if hint in (bool, bool | None):
            names[name] = hint is not bool
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            names |= _switch_names(hint)
    return names


def given_flags(args: Sequence[str]) -> list[str]:
    """Names of the fields that the flags in ``args`` set, in order: batch_size for --batch-size=4,
    and compile for --no_compile."""
    return list(dict.fromkeys(map(current_name, _given_names(args))))


def _given_names(args: Sequence[str]) -> list[str]:
    """Names of the flags in ``args`` as they are spelled, with underscores and without ``no_``."""
    flags = (arg.partition("=")[0].replace("-", "_") for arg in args if arg.startswith("--"))
    return [flag.removeprefix("__").removeprefix("no_") for flag in flags]


def vocab_size_or(given: int, default: int) -> int:
    """The value of --vocab_size, or ``default`` where it is 0.

    Raises:
        UserError: it is negative or more than ids have bits for.
    """
    if given < 0:
        raise UserError(f"vocab_size is {given}: it must be at least 1, or 0 for {default:,}")
    at_most(MOST_IDS, "vocab_size", given)
    return given or default


def perhaps(name: str, known: Collection[str]) -> str:
    """``; perhaps you meant --learning_rate``: the flag that others call ``name``, or the nearest ones;
    empty if there is none."""
    if name in REMOVED_FIELDS:
        return f"; {LAST_WITH_REMOVED} is the last that had it (see docs/time-to-loss.md)"
    usual = _FLAGS_BY_NAME.get(name.lower())
    close = [usual] if usual in known else difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    return f"; perhaps you meant {' or '.join(f'--{flag}' for flag in close)}" if close else ""


def _one_line(box: str, known: Collection[str]) -> str:
    """The message in the parser's box, with a suggestion if there is one."""
    sections: list[list[str]] = [[]]
    # The first line is the box's title, which says less than its content.
    for row in (line.strip("│|╰╯+ ") for line in box.strip().splitlines()[1:]):
        if row and set(row) <= set("─-"):
            sections.append([])
        elif row:
            sections[-1].append(row)
    texts = [" ".join(section) for section in sections if section]
    message = re.sub(r"^Error parsing (?!--)[\w.]*: ", "", texts[0]) if texts else ""
    return _in_plain_words(message.rstrip("."), known) or "the flags cannot be read"


def _in_plain_words(message: str, known: Collection[str]) -> str:
    """The parser's message in words that need no knowledge of Python."""
    if match := re.fullmatch(r"Unrecognized options: (.*)", message):
        names = [name.removeprefix("--") for name in re.findall(r"--[\w-]+", match[1])]
        hints = (perhaps(name.replace("-", "_"), known) for name in names)
        return message + next((hint for hint in hints if hint), "")
    if match := re.fullmatch(r"Missing from .*?: (.*?) \(required\).*", message):
        name, _, meaning = match[1].partition(" ")
        return f"{name} is missing: {meaning.rstrip('.')}"
    numbers = (
        (r"invalid literal for int\(\) with base 10: (.*)", "a whole number"),
        (r"could not convert string to float: (.*)", "a number"),
    )
    for pattern, kind in numbers:
        if match := re.match(rf"Error parsing (--\w+): .*?{pattern}", message):
            return f"{match[1]} must be {kind}, not {match[2]}"
    if match := re.match(r"Error parsing (--\w+): .*Exceeds the limit", message):
        return f"{match[1]} must be a whole number of fewer digits"
    return message


def _flag_names(kind: type[Any]) -> set[str]:
    """Names of all flags of a command."""
    names: set[str] = set()
    for f in dataclasses.fields(kind):
        inner = {"config": TrainConfig, "model": ModelConfig}.get(f.name)
        names |= _flag_names(inner) if inner else {f.name}
    return names


def default_for(args: Sequence[str]) -> TrainConfig:
    """The config of --preset and --method, which the other flags start from, so help shows its values."""
    chosen: dict[str, str] = {}
    for i, arg in enumerate(args):  # the last one counts, as with every flag
        flag, _, value = arg.partition("=")
        if flag in ("--preset", "--method"):
            chosen[flag] = value or (args[i + 1] if i + 1 < len(args) else "")
    return preset_config(chosen.get("--preset", DEFAULT_PRESET), chosen.get("--method", "record"))
