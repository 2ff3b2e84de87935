"""How long a training step takes: every part's FLOPs and bytes against a card's limits.

A part takes the longer of its arithmetic and its memory traffic, plus the time to start its kernels
(Williams et al. 2009, the roofline model). What software reaches of the limits is kept apart from the
limits themselves: see :data:`SOFTWARE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from storylab.config import ModelConfig, TrainConfig
from storylab.model.flops import (
    attention_flops,
    head_flops,
    linear_flops,
)
from storylab.optim import OPTIMIZERS, update_costs
from storylab.planning.cards import Card
from storylab.precision.recipes import Recipe
from storylab.training.measure import ELEMENTWISE


@dataclass(frozen=True)
class Traffic:
    """Bytes that elementwise operations move for each element, forward and backward together, and the
    kernels that they are. What only some models or optimizers have is by default stepwise.

    Attributes:
        norm: an element of the residual stream through a norm.
        rotary: a feature of a query or key that is turned.
        gate: a hidden feature of the feed-forward layer, its activation and product.
        residual: an element of a residual sum.
        logit: a logit: written, its softmax, the gradient, both read by products.
        block_kernels: kernels started for a block.
        other_kernels: those for the rest of the model.
        mix: an element of a sum with learned scales: embedding residual, added values.
        norm_kernels: kernels started for a norm that not every model has.
        mix_kernels: those for a sum with learned scales.
        least_update: whether an update moves the least that it can, and not what PyTorch does.
    """

    norm: float
    rotary: float
    gate: float
    residual: float
    logit: float
    block_kernels: int
    other_kernels: int
    mix: float = 88
    norm_kernels: int = 16
    mix_kernels: int = 10
    least_update: bool = False


@dataclass(frozen=True)
class Software:
    """What a kind of software reaches of a card's limits.

    Attributes:
        products: share of the peak rate in matrix products.
        attention: the same in attention.
        bandwidth: share of the memory's bandwidth in elementwise work.
        launch: seconds from kernel to kernel that the card waits.
        update_launch: the same in the update, which torch.compile is not used for.
        traffic: what its elementwise operations move.
    """

    name: str
    products: float
    attention: float
    bandwidth: float
    launch: float
    update_launch: float
    traffic: Traffic


# A kernel for each step of a formula; one for steps in a row; and the least that must be moved.
STEPWISE = Traffic(84, 48, 27, 22, 34, 120, 40)
FUSED = Traffic(16, 8, 16, 16, 12, 25, 15, mix=40, norm_kernels=2, mix_kernels=3)
LEAST = Traffic(10, 4, 12, 8, 6, 15, 10, mix=24, norm_kernels=2, mix_kernels=1, least_update=True)
LIMIT = Software("the card's limit", 1.0, 1.0, 1.0, 0.0, 0.0, LEAST)
# Round figures with which the published speeds in docs/plan.md come out: calibrated, not derived.
SOFTWARE: dict[str, Software] = {
    "eager": Software("eager PyTorch", 0.80, 0.50, 0.92, 8e-6, 8e-6, STEPWISE),
    "compiled": Software("torch.compile", 0.83, 0.60, 0.85, 3e-6, 8e-6, FUSED),
    "handwritten": Software("hand-written kernels", 0.92, 0.80, 0.90, 2e-6, 2e-6, LEAST),
}


@dataclass(frozen=True)
class Part:
    """One part of a micro-batch's work, forward and backward.

    Attributes:
        flops: arithmetic; of matrix products only, the rest being bound by memory.
        bytes: memory traffic.
        kernels: how many are started, a share of them where it is a share of an update.
        form: what the products are computed in.
    """

    name: str
    bytes: float
    flops: float = 0.0
    kernels: float = 0
    form: str = "bfloat16"

    def seconds(self, card: Card, software: Software) -> float:
        """Time of the part."""
        rate = card.tflops(self.form)
        assert rate is not None
        share = software.attention if self.name == ATTENTION else software.products
        arithmetic = self.flops / (rate * 1e12 * share)
        traffic = self.bytes / (card.bandwidth * 1e12 * software.bandwidth)
        updates = self.name in (UPDATE, ORTHOGONALISING)
        launch = software.update_launch if updates else software.launch
        return max(arithmetic, traffic) + self.kernels * launch


ATTENTION, QUANTISING = "attention products", "quantising"
UPDATE, ORTHOGONALISING = "update", "update, products of Muon"
# Of a weight: cast for every micro-batch, its gradient added up.
WEIGHT_TRAFFIC = 16
# Of a parameter whose average is kept: both read, the average written.
AVERAGE_TRAFFIC = 12
# Kernels of the average: each takes many parameters at once.
AVERAGE_KERNELS = 5
# Of an element of a quantised operand, its block scale included.
OPERAND_BYTES = {"fp8": 1.0, "fp4": 0.5625}
# Of an element that is quantised: read in bfloat16 twice, written in both layouts.
QUANTIZED_TRAFFIC = {"fp8": 6.0, "fp4": 5.1}


def parts(
    config: TrainConfig, vocab_size: int, software: Software, recipe: Recipe | None = None
) -> list[Part]:
    """The parts of one micro-batch, the update's share included, in the order of a step."""
    model = config.model
    tokens = config.batch_size * config.block_size
    traffic = software.traffic
    width, layers = model.n_embd, model.n_layer
    elementwise = (
        (2 * layers + 1) * width * traffic.norm
        + layers * _rotated(model) * traffic.rotary
        + layers * model.n_hidden * traffic.gate
        + 2 * layers * width * traffic.residual
    )
    more_elementwise, more_kernels = _options(model, traffic)
    return [
        *_linear_parts(config, recipe),
        Part(
            "output head",
            flops=tokens * 3 * head_flops(model, vocab_size),
            bytes=6.0 * (tokens * (width + vocab_size) + vocab_size * width),
            kernels=traffic.other_kernels,
        ),
        Part(
            ATTENTION,
            flops=tokens * 3.5 * attention_flops(model, config.block_size),
            bytes=tokens * layers * 28.0 * model.qkv_size,
            kernels=2 * layers,
        ),
        Part(
            ELEMENTWISE,
            bytes=tokens * (elementwise + more_elementwise),
            kernels=layers * traffic.block_kernels + more_kernels,
        ),
        Part("logits and loss", bytes=tokens * vocab_size * traffic.logit),
        Part(
            "casts of weights, sums of gradients",
            bytes=(_block_weights(model) + vocab_size * width) * WEIGHT_TRAFFIC,
        ),
        *_update_parts(config, vocab_size, traffic),
    ]


def _rotated(model: ModelConfig) -> int:
    """Features of a block's queries and keys."""
    return (model.n_head + model.n_kv_head) * model.head_size


def _block_weights(model: ModelConfig) -> int:
    """Entries of the blocks' matrices."""
    return model.n_layer * linear_flops(model) // 2


def _options(model: ModelConfig, traffic: Traffic) -> tuple[float, int]:
    """Bytes a token, and kernels, of the elementwise work that the record's model has not got."""
    layers, width = model.n_layer, model.n_embd
    adding = sum(model.adds_values(layer) for layer in range(layers))
    norm_elements = model.qk_norm * layers * _rotated(model)
    norms = model.qk_norm * layers * 2
    mixed_elements = model.embedding_residual * layers * width
    mixed_elements += adding * model.n_kv_head * model.head_size
    mixes = model.embedding_residual * layers + adding
    return (
        norm_elements * traffic.norm + mixed_elements * traffic.mix,
        norms * traffic.norm_kernels + mixes * traffic.mix_kernels,
    )


def _update_parts(config: TrainConfig, vocab_size: int, traffic: Traffic) -> list[Part]:
    """A micro-batch's share of the update, of the weights' average too; Muon's products apart, as their
    arithmetic does not overlap with what memory bounds."""
    model, updates = config.model, 1 / config.gradient_accumulation_steps
    parameters = model.parameter_count(vocab_size)
    moved, kernels = 0.0, 0
    for cost, elements in update_costs(config.optimizer, parameters, _block_weights(model)):
        moved += elements * (cost.least_bytes if traffic.least_update else cost.bytes)
        kernels += cost.kernels
    if config.average_share:
        moved += parameters * AVERAGE_TRAFFIC
        kernels += AVERAGE_KERNELS
    entry = OPTIMIZERS[config.optimizer]
    fused = [(rows, m.n_in) for m in model.matrices() for rows in m.parts]
    shapes = len(set(fused))
    # A block has four weights: two of them fuse projections, each a matrix of its own.
    kernels += shapes * entry.cost.shape_kernels
    kernels += len(model.matrices()) * model.n_layer * entry.cost.weight_kernels
    update = Part(UPDATE, bytes=moved * updates, kernels=kernels * updates)
    if not entry.cost.product_kernels:
        return [update]
    flops = model.n_layer * sum(entry.cost.product_flops(*shape) for shape in fused)
    return [
        update,
        Part(
            ORTHOGONALISING,
            bytes=0.0,  # in the cache, or bound by arithmetic where it is too large for that
            flops=flops * updates,
            kernels=shapes * entry.cost.product_kernels * updates,
        ),
    ]


def _linear_parts(config: TrainConfig, recipe: Recipe | None) -> list[Part]:
    """The linear layers of the blocks, those products apart that ``recipe`` has in low precision."""
    model = config.model
    tokens, layers = config.batch_size * config.block_size, model.n_layer
    linear = linear_flops(model)
    # Elements that the four layers of a block read and write for a token.
    activations = (3 * model.n_embd + model.n_hidden) + (
        model.qkv_size + 2 * model.n_embd + 2 * model.n_hidden
    )
    # Each product reads two operands and writes its result.
    moved = layers * (tokens * activations + linear // 2)
    flops = tokens * 3 * layers * linear
    # Each layer has three products: the forward pass, the gradients of its input and of its weight.
    products = len(recipe.low_blocks(layers)) * recipe.low_products / 3 if recipe is not None else 0
    if recipe is None or not products:
        return [Part("linear layers", flops=flops, bytes=6.0 * moved)]
    form, share = recipe.form, products / layers
    return [
        Part("linear layers", flops=(1 - share) * flops, bytes=(1 - share) * 6.0 * moved),
        Part(
            f"linear layers in {form.upper()}",
            flops=share * flops,
            form=form,
            # Operands are read in the low format, results written as before.
            bytes=share * moved * (2.0 + 2.0 * OPERAND_BYTES[form]),
        ),
        Part(QUANTISING, bytes=products * tokens * activations * QUANTIZED_TRAFFIC[form]),
    ]


def micro_batch_seconds(work: Sequence[Part], card: Card, software: Software) -> float:
    """Time of a micro-batch."""
    return sum(part.seconds(card, software) for part in work)


def tokens_per_second(
    config: TrainConfig,
    vocab_size: int,
    card: Card,
    software: Software,
    recipe: Recipe | None = None,
) -> float:
    """Predicted speed."""
    work = parts(config, vocab_size, software, recipe)
    tokens = config.batch_size * config.block_size
    return tokens / micro_batch_seconds(work, card, software)


def gains(
    config: TrainConfig, vocab_size: int, card: Card, software: Software, recipe: Recipe
) -> tuple[float, float]:
    """Speed-up that the recipe is predicted to bring, and the most that it can by Amdahl's law: its
    products at the card's rate of their format, quantised for nothing, and all else as it is."""
    work = parts(config, vocab_size, software, recipe)
    free = [part for part in work if part.name != QUANTISING]
    before = micro_batch_seconds(parts(config, vocab_size, software), card, software)
    return (
        before / micro_batch_seconds(work, card, software),
        before / micro_batch_seconds(free, card, software),
    )


def memory_bytes(config: TrainConfig, vocab_size: int) -> float:
    """Peak memory of training on a GPU: weights, gradients, what the optimizers keep and averages in
    float32, what a micro-batch keeps for its backward pass in bfloat16 (float32 in the residual stream),
    and a chunk of logits."""
    model = config.model
    tokens = config.batch_size * config.block_size
    qkv = model.qkv_size
    kept = 4 * 4 * model.n_embd + 2 * (4 * model.n_embd + 2 * qkv + 4 * model.n_hidden)
    activations = tokens * model.n_layer * kept
    return 4.0 * _numbers_kept(config, vocab_size) + activations + 4.0 * vocab_size * 2048


def _numbers_kept(config: TrainConfig, vocab_size: int) -> int:
    """Float32 numbers in weights, gradients, the state of the optimizers, and the average."""
    model = config.model
    parameters = model.parameter_count(vocab_size)
    kept = (3 if config.average_share else 2) * parameters
    for cost, elements in update_costs(config.optimizer, parameters, _block_weights(model)):
        kept += cost.state * elements
    rows = model.n_layer * sum(matrix.n_out for matrix in model.matrices())
    return kept + OPTIMIZERS[config.optimizer].cost.row_state * rows
