"""The work and memory of a step against kernels that are counted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from storylab.cli import main
from storylab.config import ModelConfig, TrainConfig
from storylab.model.cost import StepPart, attention_flops, training_flops
from storylab.model.transformer import Transformer
from storylab.optim import OPTIMIZERS
from storylab.optim.build import build_optimizers, skip_where
from storylab.planning.gpus import GPUS, Gpu
from storylab.planning.predict import can_run
from storylab.planning.roofline import (
    Work,
    memory_bytes,
    micro_batch_work,
    tokens_per_second,
)
from storylab.planning.software import GAP, LIMIT, SOFTWARE
from storylab.precision.edit import find_recipe
from storylab.precision.recipes import RECIPES
from storylab.training.precision import ComputePolicy
from storylab.training.state import TrainState

RECORD = TrainConfig()
VOCAB = 50257
SHAPE = ModelConfig(n_layer=4, n_head=12, n_kv_head=3, n_embd=192, n_hidden=512)


class Traffic(TorchDispatchMode):
    """Counts kernels and the bytes that they read and write, products and attention left out."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes = 0, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        product = name in ("mm", "bmm", "baddbmm") or "attention" in name
        nothing = function.is_view or name.startswith(("empty", "new_empty", "_unsafe_view"))
        if not (product or nothing or name.startswith(("_record", "scalar_tensor"))):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if torch.is_tensor(t)]
            self.kernels += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


def work_named(config: TrainConfig, name: str, vocab_size: int = 300) -> Work:
    """One line of a plan with eager PyTorch."""
    work = micro_batch_work(config, vocab_size, SOFTWARE["eager"])
    return next(each for each in work if each.name == name)


def test_products_are_those_of_the_model() -> None:
    for recipe in (None, *RECIPES.values()):
        work = micro_batch_work(RECORD, VOCAB, LIMIT, recipe)
        tokens = RECORD.batch_size * RECORD.block_size
        # The backward pass of attention makes its scores again.
        again = 0.5 * attention_flops(RECORD.model, RECORD.block_size)
        expected = training_flops(RECORD.model, VOCAB, RECORD.block_size) + again
        assert sum(part.flops for part in work) == pytest.approx(tokens * expected)


def test_the_products_of_a_muon_update_are_counted() -> None:
    """Against torch's counter, on a step of the optimizer itself."""
    shape = ModelConfig(n_layer=2, n_head=4, n_kv_head=1, n_embd=64, n_hidden=160)
    config = TrainConfig(model=shape, optimizer="muon", gradient_accumulation_steps=1)
    model = Transformer(shape, 300)
    muon, _ = build_optimizers(model, config)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    products = work_named(config, f"update, products of {OPTIMIZERS['muon'].label}")
    assert products.flops == counter.get_total_flops() > 0


def passes(model: ModelConfig) -> Traffic:
    """Forward and backward pass of a model over 8 x 128 tokens, its head left out, without a device
    that would redo anything."""
    network = Transformer(model, 300).to("meta")
    tokens = torch.zeros(8, 128, dtype=torch.int64, device="meta")
    with Traffic() as seen, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        network.hidden_states(tokens).float().sum().backward()
    return seen


@pytest.mark.parametrize(
    "option",
    [
        {"qk_norm": True},
        {"embedding_residual": True},
        {"value_residual": "first_layer"},
    ],
    ids=str,
)
def test_the_elementwise_work_of_a_models_options_is_counted(option: dict[str, Any]) -> None:
    """Against what PyTorch does, within what its copies on the way come to."""
    model = dataclasses.replace(SHAPE, **option)
    with_option, without = (
        work_named(dataclasses.replace(RECORD, batch_size=8, model=m), StepPart.ELEMENTWISE)
        for m in (model, SHAPE)
    )
    seen, seen_without = passes(model), passes(SHAPE)
    assert with_option.bytes - without.bytes == pytest.approx(
        seen.bytes - seen_without.bytes, rel=0.5
    )
    assert with_option.kernels - without.kernels == pytest.approx(
        seen.kernels - seen_without.kernels, rel=0.5
    )


@pytest.mark.parametrize("optimizer", ["muon", "normuon"])
def test_the_elementwise_work_of_a_muon_update_is_counted(optimizer: str) -> None:
    """As it is on CUDA, where a step may be skipped on the device."""
    config = TrainConfig(model=SHAPE, optimizer=optimizer, gradient_accumulation_steps=1)  # type: ignore[arg-type]
    model = Transformer(SHAPE, 300)
    optimizers = build_optimizers(model, config)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    skip_where(optimizers, torch.tensor(False))
    optimizers[0].step()  # which makes its state
    with Traffic() as seen:
        optimizers[0].step()
    matrices = sum(p.numel() for p, _ in model.block_matrices())
    rest = 28 * (SHAPE.parameter_count(300) - matrices)  # by AdamW
    update = work_named(config, "update")
    assert update.bytes - rest == pytest.approx(seen.bytes, rel=0.1)
    assert update.kernels - 10 == pytest.approx(seen.kernels, rel=0.1)


def test_an_update_costs_the_same_kernels_compiled_or_not() -> None:
    """On a card without limits there is nothing but kernels to wait for. By hand: 10 of AdamW and clipping,
    5 of the average, 15 products and 28 others for each of four shapes, 4 for each of 16 weights."""
    gpu = Gpu("card", (8, 9), {"bfloat16": 1e9}, 1e9, 24, 300)
    config = dataclasses.replace(RECORD, model=SHAPE, optimizer="normuon", ema_fraction=0.1)
    for kind in ("eager", "compiled"):
        work = micro_batch_work(config, 300, SOFTWARE[kind])
        update = sum(w.seconds(gpu, SOFTWARE[kind]) for w in work if w.part is StepPart.UPDATE)
        assert update * 16 == pytest.approx((10 + 5 + 4 * 43 + 16 * 4) * GAP, rel=1e-3)


@pytest.mark.parametrize("ema_fraction", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_memory_is_that_of_what_an_update_keeps(optimizer: str, ema_fraction: float) -> None:
    """Against the tensors that a learner has after a step; what its passes keep is the same for all."""
    config = TrainConfig(
        model=SHAPE,
        optimizer=optimizer,  # type: ignore[arg-type]
        ema_fraction=ema_fraction,
        batch_size=1,
    )

    def kept(config: TrainConfig) -> int:
        learner = TrainState(config, 300, ComputePolicy(torch.device("cpu"), torch.float32))
        learner.step(0, torch.zeros(1, 9, dtype=torch.int64), learning_rate=0.0)
        states = [s for o in learner.optimizers for s in o.state.values()]
        tensors = [t for state in states for t in state.values()]
        tensors += [*learner.model.parameters(), *learner.ema.tensors.values()]
        tensors += [p.grad for p in learner.model.parameters() if p.grad is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    plain = dataclasses.replace(config, optimizer="adamw", ema_fraction=0.0)
    rest = memory_bytes(plain, 300) - 16 * SHAPE.parameter_count(300)
    assert memory_bytes(config, 300) - rest == pytest.approx(kept(config), rel=1e-5)


def test_a_narrow_stream_keeps_less_memory_where_it_is_compiled() -> None:
    """Two norms a block read 2 bytes less an element; uncompiled ones keep it in float32."""
    narrow = dataclasses.replace(SHAPE, residual_dtype="bfloat16")
    for compiled, saved in ((True, 2 * 2 * 64 * 128 * SHAPE.n_layer * SHAPE.n_embd), (False, 0)):
        wide = dataclasses.replace(RECORD, model=SHAPE, compile=compiled)
        less = dataclasses.replace(wide, model=narrow)
        assert memory_bytes(wide, 300) - memory_bytes(less, 300) == saved


def test_no_software_is_faster_than_the_limit() -> None:
    for gpu in GPUS.values():
        for dtype in ("bfloat16", "fp8", "nvfp4"):
            recipe = find_recipe(dtype)
            if can_run(gpu, recipe):
                limit = tokens_per_second(RECORD, VOCAB, gpu, LIMIT, recipe)
                for software in SOFTWARE.values():
                    assert tokens_per_second(RECORD, VOCAB, gpu, software, recipe) < limit


def test_what_a_card_lacks_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "rtx4090", "a100", "--dtype", "mxfp8"]) == 0
    assert capsys.readouterr().out.count("cannot train in mxfp8") == 2
    assert main(["plan", "experiments/03-nvfp4.toml", "--scale", "record", "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16" in out and "H100 SXM cannot train in nvfp4" in out
