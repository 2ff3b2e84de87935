"""Training steps on this machine for every precision and attention that it has, as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from storylab.config import WIDE_DTYPES, Dtype, ModelConfig, TrainConfig
from storylab.errors import UserError
from storylab.execution.job import Executor, Job, run_interruptibly
from storylab.model.flops import training_flops
from storylab.planning.cards import CARDS, Card
from storylab.precision.edit import find_recipe
from storylab.training.measure import PARTS
from storylab.training.setup import resolve_device

# Sequences in a micro-batch on a CPU where nothing else is said, so that a step takes about a second.
CPU_SEQUENCES = 8
COLUMNS = ("tok/s", "TFLOP/s", "of peak", "of products alone", "memory", "J/Mtok")


def variants(
    config: TrainConfig, dtypes: Sequence[Dtype], attentions: Sequence[str]
) -> Iterator[TrainConfig]:
    """The configs that are timed: every dtype with the config's attention, and bfloat16, or the first
    dtype, with each of the other attentions."""

    def timed(dtype: Dtype, model: ModelConfig) -> TrainConfig:
        # A wide dtype has no recipe to change, and nothing but torch to compute it.
        plain: dict[str, Any] = {"recipe": "", "backend": "auto"} if dtype in WIDE_DTYPES else {}
        return dataclasses.replace(config, dtype=dtype, model=model, **plain)

    for dtype in dtypes:
        yield timed(dtype, config.model)
    first: Dtype = "bfloat16" if "bfloat16" in dtypes else dtypes[0]
    for attention in attentions:
        model = dataclasses.replace(config.model, attention=attention)
        if attention != config.model.attention:
            yield timed(first, model)


def bench_lines(
    configs: Sequence[TrainConfig], vocab_size: int, seconds: float, executor: Executor
) -> Iterator[str]:
    """A header, then two lines for each config as soon as it is measured: speeds, and the shares of its
    step's parts.

    Args:
        configs: see :func:`variants`.
        vocab_size: number of token ids.
        seconds: time for steps, shared by all configs.
        executor: measures each config as a job of its own.

    Raises:
        Interrupted: a signal stopped it.
    """
    yield f"{'':<28}" + "".join(f"{name:>18}" for name in COLUMNS)
    for config in configs:
        name = _name(config)
        try:
            resolved, _ = resolve_device(config)
        except UserError as error:
            yield f"{name:<28}  cannot run here: {error}"
            continue
        options = {"vocab_size": vocab_size, "seconds": seconds / len(configs)}
        outcome = run_interruptibly(executor, Job("bench", resolved, options))
        found = outcome.answer
        if found is None:
            yield f"{name:<28}  failed: {outcome.reason}"
            continue
        cells = _cells(resolved, vocab_size, found)
        yield f"{name:<28}" + "".join(f"{cell:>18}" for cell in cells)
        yield "    " + _shares(found["shares"], resolved)


def _shares(shares: dict[str, float] | None, config: TrainConfig) -> str:
    if shares is None:
        return f"no parts: the operations of {config.backend} are not told apart"
    told = [f"{part} {shares[part]:.0%}" for part in PARTS]
    return ", ".join(part for part in told if not part.endswith(" 0%"))


def _name(config: TrainConfig) -> str:
    return f"{config.dtype}, {config.model.attention}" + (", compiled" if config.compile else "")


def _cells(config: TrainConfig, vocab_size: int, found: dict[str, Any]) -> list[str]:
    tokens = config.batch_size * config.block_size
    flops = training_flops(config.model, vocab_size, config.block_size) * tokens
    rate = flops / found["seconds"]
    peak = peak_rate(config)
    alone, joules = found["products"], found["joules"]
    return [
        f"{tokens / found['seconds']:,.0f}",
        f"{rate / 1e12:.3f}",
        f"{rate / peak:.0%}" if peak else "unknown",
        f"{alone / found['seconds']:.0%}" if alone else "",
        f"{found['memory'] / 1e9:.2f} GB",
        "not available" if joules is None else f"{1e6 * joules / tokens:,.0f}",
    ]


def peak_rate(config: TrainConfig) -> float | None:
    """FLOP/s that the device can reach at most in the config's precision; None where unknown."""
    device = torch.device(config.device)
    if device.type != "cuda" or config.dtype == "float32" or config.backend == "emulated":
        return None
    card = known_card(torch.cuda.get_device_name(device))
    recipe = find_recipe(config.dtype, config.recipe)
    rate = card.tflops(recipe.matrix_unit if recipe else "bfloat16") if card else None
    return rate * 1e12 if rate else None


def known_card(name: str) -> Card | None:
    """The card that the driver calls ``name``, such as NVIDIA GeForce RTX 5090; None if not listed.

    A laptop's card of the same number is another card, and so is one with PCIe or NVL in its name.
    """
    words = name.removeprefix("NVIDIA ").removeprefix("GeForce ").replace("-", " ").split()
    others = {"Laptop", "PCIe", "NVL", "Ti", "SUPER", "D"}
    if others & set(words):
        return None
    found = [card for card in CARDS.values() if set(card.name.split()) - {"SXM"} <= set(words)]
    return found[0] if len(found) == 1 else None
