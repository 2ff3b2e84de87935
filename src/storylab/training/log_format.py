"""The lines that a run prints, in the format of the original log."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from storylab.config import FULL, ModelConfig, TrainConfig
from storylab.model.cost import SKIPPED_BLOCK
from storylab.record.schema import Rewind, Summary

if TYPE_CHECKING:  # a plan prints durations without loading torch
    from storylab.data.batches import TrainingBatches

UNKNOWN = "unknown on this device"


def rewind_line(rewind: Rewind) -> str:
    """The line of a run that goes back to before a fault."""
    return (
        f"iteration {rewind.iteration}: {rewind.reason}; going back to iteration {rewind.back_to}, past "
        f"the {rewind.batches} batches since"
    )


def iteration_line(
    iteration: int, loss: float, seconds: float, tokens: int, learning_rate: float
) -> str:
    """``iter 100:  loss 7.5410,  time 112196.47ms, 116,824 tok/s,  lr 1.00e-05``.

    ``seconds`` is the wall time since the line before, evaluations included, and ``tokens`` the
    tokens trained in it: 0 on the first line.
    """
    speed = tokens / seconds if seconds > 0 else 0.0
    fields = (
        (f"iter {iteration}:", 10),
        (f"loss {loss:.4f},", 13),
        (f"time {seconds * 1000:.2f}ms,", 17),
        (f"{speed:,.0f} tok/s,", 15),
        (f"lr {learning_rate:.2e}", 0),
    )
    return " ".join(text.ljust(width) for text, width in fields)


def evaluation_line(iteration: int, train_loss: float, val_loss: float) -> str:
    """``Step 500:  train loss 3.2190, val loss 3.2224``."""
    return f"{f'Step {iteration}:':<10} train loss {train_loss:.4f}, val loss {val_loss:.4f}"


def best_line(val_loss: float) -> str:
    """``Saved new best model (val loss: 3.2224)``."""
    return f"Saved new best model (val loss: {val_loss:.4f})"


def idle_windows(model: ModelConfig, block_size: int) -> str | None:
    """Why windows save no time on a GPU in sequences of ``block_size`` tokens; None where they may."""
    if block_size > SKIPPED_BLOCK or all(
        pattern.covers(block_size) for pattern in model.layer_patterns
    ):
        return None
    return (
        f"on a GPU these windows save no time at {block_size} tokens: attention there skips whole "
        f"blocks of {SKIPPED_BLOCK} positions"
    )


def attention_lines(model: ModelConfig, block_size: int, cuda: bool = False) -> list[str]:
    """The effective window of every layer and how far back they reach together; none if full."""
    if set(model.layer_patterns) == {FULL}:
        return []
    lines = []
    for layer, pattern in enumerate(model.layer_patterns, start=1):
        reads = f"reads up to {pattern.most_read(block_size)} of {block_size} positions"
        lines.append(f"layer {layer:>2}: {pattern.label}, {reads}")
    field = model.receptive_field
    reach = block_size if field is None else min(field, block_size)
    lines.append(f"receptive field of an output: {reach} of {block_size} positions")
    idle = idle_windows(model, block_size) if cuda else None
    return [*lines, *([idle] if idle else []), ""]


def unseen_lines(unseen: int, tokens: int, block_size: int) -> list[str]:
    """How much of the training split no window of ``block_size`` reaches; none if under 0.1 %."""
    if unseen < tokens / 1000:
        return []
    return [
        f"the last {unseen:,} of {tokens:,} training tokens ({unseen / tokens:.1%}) are never trained on: "
        f"they do not fill a window of {block_size:,}",
        "",
    ]


def opening_lines(config: TrainConfig, batches: TrainingBatches, cuda: bool) -> list[str]:
    """Lines for the start of a run: the reach of its windows, and the tokens that it never trains on."""
    size, tokens = config.block_size, len(batches.split)
    windows = attention_lines(config.model, size, cuda)
    return [*windows, *unseen_lines(batches.unseen, tokens, size)]


def format_duration(seconds: float) -> str:
    """``18 min 43 s``, ``2 h 05 min`` or ``41.2 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def printable(text: str) -> str:
    """``text`` with control characters replaced: a model can write any byte, a terminal obeys some."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


def _figure(value: float | None, form: str, unknown: str = UNKNOWN) -> str:
    return unknown if value is None else form.format(value)


def _with_perplexity(loss: float | None) -> str:
    if loss is None:
        return "none yet"
    return f"{loss:.4f} (perplexity {math.exp(min(loss, 700)):,.2f})"


def windows_words(block_size: int, aligned: bool = False) -> str:
    """The windows that a whole split was read in, without which its loss means little."""
    course = "that start again at every story" if aligned else "running through the stories in turn"
    return f"windows of {block_size:,} tokens {course}"


def summary_lines(summary: Summary) -> list[str]:
    """The results of a run from its summary, in the order of the original log."""
    full = summary.validation
    energy = summary.energy_joules
    rows = [
        ("Final train loss", _with_perplexity(summary.final_train_loss)),
        ("Final val loss", _with_perplexity(summary.final_val_loss)),
        (
            "Whole val split",
            f"loss {full.loss:.4f} +/- {_figure(full.standard_error, '{:.4f}', 'unknown')} "
            f"(standard error over {full.stories:,} stories), perplexity {full.perplexity:,.2f}, "
            f"{full.bits_per_byte:.4f} bits per byte"
            + (f"; {windows_words(full.block_size)}" if full.block_size is not None else "")
            if full
            else "not evaluated",
        ),
        (
            "Average speed",
            f"{summary.tokens_per_second:,.0f} tok/s"
            + (" (emulated precision: no measure of hardware)" if summary.emulated else ""),
        ),
        (
            "Total time",
            f"{format_duration(summary.seconds)} for {summary.iterations:,} iterations "
            f"({summary.tokens:,} tokens, {summary.epochs:.2f} epochs)",
        ),
        ("Power", _figure(summary.power_watts, "{:.0f} W")),
        ("Utilisation", _figure(summary.utilization_percent, "{:.0f} %")),
        ("Energy", _figure(None if energy is None else energy / 3600, "{:.1f} Wh")),
        ("Peak memory", f"{summary.peak_memory_bytes / 1e9:.2f} GB ({summary.memory_kind})"),
    ]
    lines = ["Results", *(f"  {name + ':':<17} {value}" for name, value in rows)]
    for sample in summary.samples:
        lines += ["", f"Sample for {sample.prompt!r}:", printable(sample.text)]
    return lines


def precision_line(dtype: str, found: dict[str, Any]) -> str:
    """The findings of the precision self-test, in one line."""
    return (
        f"{dtype} ({found['backend']}): {found['low']} of {found['products']} products of "
        f"{len(found['layers'])} linear layers run low, {found['share_of_flops']:.0%} of all matrix "
        "multiplication; self-test passed"
    )
