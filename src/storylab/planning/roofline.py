"""Predict the time of a training step: the FLOPs and bytes of every part against a GPU's limits.

On the GPU a part takes the longer of its arithmetic and its memory traffic (Williams et al. 2009, the
roofline model), and a gap for each of its kernels. The host starts kernels while the GPU works, so a
micro-batch takes as long as the slower of the two. :mod:`storylab.planning.gpus` has the limits,
:mod:`storylab.planning.software` the shares of them that software reaches. Parts are those of
:class:`StepPart`, into which a profile cuts a measured step too. This module does not load torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storylab.config import ModelConfig, TrainConfig
from storylab.model.cost import (
    StepPart,
    attention_flops,
    head_flops,
    linear_features,
    linear_flops,
)
from storylab.optim import OPTIMIZERS, update_costs
from storylab.planning.gpus import Gpu
from storylab.planning.software import Software, Traffic
from storylab.precision.formats import MatrixUnit
from storylab.precision.recipes import Recipe

# Bytes per parameter whose average is kept: both read, the average written.
AVERAGE_TRAFFIC = 12
# Kernels of the average, each for many parameters at once.
AVERAGE_KERNELS = 5


@dataclass(frozen=True)
class Work:
    """Work of a micro-batch, forward and backward, that runs under one limit.

    Attributes:
        part: of the step.
        name: in tables; a part may consist of several works.
        bytes: memory traffic.
        flops: arithmetic, of matrix products only; other operations are bound by memory.
        kernels: number started; a fraction where the work is a share of an update.
        unit: matrix unit of the products.
    """

    part: StepPart
    name: str
    bytes: float
    flops: float = 0.0
    kernels: float = 0
    unit: MatrixUnit = "bfloat16"

    def seconds(self, gpu: Gpu, software: Software) -> float:
        """Predicted time of the GPU.

        Raises:
            KeyError: the GPU lacks the matrix unit.
        """
        share = software.attention if self.part is StepPart.ATTENTION else software.products
        rate = gpu.limit_rate(self.unit) if software.limit else gpu.product_rate(self.unit)
        arithmetic = self.flops / (rate * 1e12 * share)
        traffic = self.bytes / (gpu.bandwidth * 1e12 * software.bandwidth)
        return max(arithmetic, traffic) + self.kernels * software.gap


def micro_batch_work(
    config: TrainConfig, vocab_size: int, software: Software, recipe: Recipe | None = None
) -> list[Work]:
    """The work of one micro-batch, its share of the update included, in the order of a step."""
    model = config.model
    tokens = config.batch_size * config.block_size
    width, layers, traffic = model.n_embd, model.n_layer, software.traffic
    return [
        *_linear_work(config, recipe),
        Work(
            StepPart.HEAD,
            "output head",
            flops=tokens * 3 * head_flops(model, vocab_size),
            bytes=6.0 * (tokens * (width + vocab_size) + vocab_size * width),
            kernels=traffic.other_kernels,
        ),
        Work(
            StepPart.ATTENTION,
            "attention products",
            flops=tokens * 3.5 * attention_flops(model, config.block_size),
            bytes=tokens * layers * 28.0 * model.qkv_size,
            kernels=2 * layers,
        ),
        _elementwise_work(model, tokens, traffic),
        Work(StepPart.HEAD, "logits and loss", bytes=tokens * vocab_size * traffic.logit),
        Work(
            StepPart.CASTS,
            "casts of weights, sums of gradients",
            bytes=(_block_weights(model) + vocab_size * width) * traffic.weight,
        ),
        *_update_work(config, vocab_size, traffic),
    ]


def _elementwise_work(model: ModelConfig, tokens: int, traffic: Traffic) -> Work:
    """Norms, rotary positions, gates and residuals."""
    width, layers = model.n_embd, model.n_layer
    residual = traffic.residual - (model.residual_dtype == "bfloat16") * traffic.narrow
    elementwise = (
        (2 * layers + 1) * width * traffic.norm
        + layers * _rotated(model) * traffic.rotary
        + layers * model.n_hidden * traffic.gate
        + 2 * layers * width * residual
    )
    more_elementwise, more_kernels = _options(model, traffic)
    return Work(
        StepPart.ELEMENTWISE,
        StepPart.ELEMENTWISE,
        bytes=tokens * (elementwise + more_elementwise),
        kernels=layers * traffic.block_kernels + more_kernels,
    )


def _rotated(model: ModelConfig) -> int:
    """Features of a block's queries and keys."""
    return (model.n_head + model.n_kv_head) * model.head_size


def _block_weights(model: ModelConfig) -> int:
    """Number of weights in the matrices of all blocks."""
    return model.n_layer * sum(matrix.size for matrix in model.matrices())


def _options(model: ModelConfig, traffic: Traffic) -> tuple[float, int]:
    """Bytes per token, and kernels, of the elementwise work that the default model does not have."""
    layers, width = model.n_layer, model.n_embd
    adding = sum(model.has_value_residual(layer) for layer in range(layers))
    norm_elements = model.qk_norm * layers * _rotated(model)
    norms = model.qk_norm * layers * 2
    mixed_elements = model.embedding_residual * layers * width
    mixed_elements += adding * model.n_kv_head * model.head_size
    mixes = model.embedding_residual * layers + adding
    return (
        norm_elements * traffic.norm + mixed_elements * traffic.mix,
        norms * traffic.norm_kernels + mixes * traffic.mix_kernels,
    )


def _update_work(config: TrainConfig, vocab_size: int, traffic: Traffic) -> Iterator[Work]:
    """A micro-batch's share of the update, the average of the weights included. The optimizer's
    matrix products are separate works, as their arithmetic does not overlap with memory-bound
    work."""
    model, updates = config.model, 1 / config.gradient_accumulation_steps
    parameters = model.parameter_count(vocab_size)
    moved, kernels = 0.0, 0
    for cost, elements in update_costs(config.optimizer, parameters, _block_weights(model)):
        moved += elements * (cost.least_bytes if traffic.least_update else cost.bytes)
        kernels += cost.kernels
    if config.ema_fraction:
        moved += parameters * AVERAGE_TRAFFIC
        kernels += AVERAGE_KERNELS
    cost = OPTIMIZERS[config.optimizer].cost
    projections = [(rows, m.n_in) for m in model.matrices() for rows in m.parts]
    shapes = len(set(projections))
    kernels += shapes * cost.shape_kernels
    kernels += model.n_layer * len(model.matrices()) * cost.weight_kernels
    yield Work(StepPart.UPDATE, "update", bytes=moved * updates, kernels=kernels * updates)
    flops = model.n_layer * sum(cost.product_flops(*shape) for shape in projections)
    if flops:
        yield Work(
            StepPart.UPDATE,
            f"update, products of {OPTIMIZERS[config.optimizer].label}",
            bytes=0.0,  # the operands are in the cache; those too large for it are bound by arithmetic
            flops=flops * updates,
            kernels=shapes * cost.product_kernels * updates,
        )


def _linear_work(config: TrainConfig, recipe: Recipe | None) -> Iterator[Work]:
    """The linear layers of the blocks; products that ``recipe`` quantizes are separate works."""
    model = config.model
    tokens, layers = config.batch_size * config.block_size, model.n_layer
    linear = linear_flops(model)
    activations = linear_features(model)
    # Each product reads two operands and writes its result.
    moved = layers * (tokens * activations + linear // 2)
    flops = tokens * 3 * layers * linear
    # Each layer has three products: the forward pass, the gradients of its input and of its weight.
    products = 0.0
    if recipe is not None:
        products = len(recipe.quantized_blocks(layers)) * recipe.quantized_gemms / 3
    share, linear_part = products / layers, StepPart.LINEAR
    # A product and its two gradients for each matrix.
    kernels = 3 * layers * len(model.matrices())
    yield Work(
        linear_part,
        "linear layers",
        flops=(1 - share) * flops,
        bytes=(1 - share) * 6.0 * moved,
        kernels=(1 - share) * kernels,
    )
    if recipe is None or not products:
        return
    unit, element = recipe.matrix_unit, recipe.bytes_per_element
    yield Work(
        linear_part,
        f"linear layers in {unit.upper()}",
        flops=share * flops,
        unit=unit,
        # Operands are read in the low format, results written as before.
        bytes=share * moved * (2.0 + 2.0 * element),
        kernels=share * kernels,
    )
    # Every element is read in bfloat16 twice and written in both layouts.
    traffic = products * tokens * activations * (2 * 2.0 + 2 * element)
    yield Work(StepPart.QUANTIZING, "quantizing", bytes=traffic)


def predicted_shares(
    config: TrainConfig,
    vocab_size: int,
    gpu: Gpu,
    software: Software,
    recipe: Recipe | None = None,
) -> dict[StepPart, float]:
    """Predicted share of the GPU's time that each part of a micro-batch takes."""
    times: dict[StepPart, float] = defaultdict(float)
    for work in micro_batch_work(config, vocab_size, software, recipe):
        times[work.part] += work.seconds(gpu, software)
    return {part: times[part] / sum(times.values()) for part in StepPart}


def waiting_seconds(work: Sequence[Work], gpu: Gpu, software: Software) -> float:
    """Predicted seconds of a micro-batch in which the GPU waits for the host to start kernels."""
    host = sum(each.kernels for each in work) * software.launch
    return max(0.0, host - sum(each.seconds(gpu, software) for each in work))


def micro_batch_seconds(work: Sequence[Work], gpu: Gpu, software: Software) -> float:
    """Predicted seconds of a micro-batch: those of the GPU, or of the host where it takes longer."""
    busy = sum(each.seconds(gpu, software) for each in work)
    return busy + waiting_seconds(work, gpu, software)


def tokens_per_second(
    config: TrainConfig,
    vocab_size: int,
    gpu: Gpu,
    software: Software,
    recipe: Recipe | None = None,
) -> float:
    """Predicted tokens per second."""
    work = micro_batch_work(config, vocab_size, software, recipe)
    tokens = config.batch_size * config.block_size
    return tokens / micro_batch_seconds(work, gpu, software)


def gains(
    config: TrainConfig, vocab_size: int, gpu: Gpu, software: Software, recipe: Recipe
) -> tuple[float, float]:
    """Speed-up that the recipe is predicted to bring, and the most that it can by Amdahl's law: its
    products at the GPU's rate of their format, quantized at no cost, and everything else
    unchanged."""
    work = micro_batch_work(config, vocab_size, software, recipe)
    free = [each for each in work if each.part is not StepPart.QUANTIZING]
    before = micro_batch_seconds(micro_batch_work(config, vocab_size, software), gpu, software)
    return (
        before / micro_batch_seconds(work, gpu, software),
        before / micro_batch_seconds(free, gpu, software),
    )


def memory_bytes(config: TrainConfig, vocab_size: int) -> float:
    """Peak memory of training on a GPU.

    The sum of: weights, gradients, optimizer state and average in float32; the activations that a
    micro-batch keeps for its backward pass, in bfloat16, but the residual stream in float32, unless it
    is narrow and compiled; and a chunk of logits.
    """
    model = config.model
    tokens = config.batch_size * config.block_size
    qkv = model.qkv_size
    kept = 4 * 4 * model.n_embd + 2 * (4 * model.n_embd + 2 * qkv + 4 * model.n_hidden)
    if model.residual_dtype == "bfloat16" and config.compile:
        kept -= 2 * 2 * model.n_embd  # before each of two norms
    activations = tokens * model.n_layer * kept
    return 4.0 * _numbers_kept(config, vocab_size) + activations + 4.0 * vocab_size * 2048


def _numbers_kept(config: TrainConfig, vocab_size: int) -> int:
    """Number of float32 values that training keeps: weights, gradients, the optimizer's state and the
    average of the weights."""
    model = config.model
    parameters = model.parameter_count(vocab_size)
    kept = (3 if config.ema_fraction else 2) * parameters
    for cost, elements in update_costs(config.optimizer, parameters, _block_weights(model)):
        kept += cost.state * elements
    rows = model.n_layer * sum(matrix.n_out for matrix in model.matrices())
    return kept + OPTIMIZERS[config.optimizer].cost.row_state * rows
