"""Shape of the transformer, and the matrices that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from storylab.config.marks import COUNT, at_least, at_most, check_fields, mark
from storylab.config.patterns import AttentionPattern, parse_attention
from storylab.errors import UserError

ValueResidual = Literal["none", "first_layer"]
ResidualDtype = Literal["float32", "bfloat16"]

# Layers are built one by one.
LAYERS = (partial(at_least, 1), partial(at_most, 10_000))


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a block.

    Attributes:
        name: of its layer within the block.
        n_out: output features, its rows.
        n_in: input features, its columns.
        parts: output features of each projection that the matrix fuses, in order; they sum to ``n_out``.
    """

    name: str
    n_out: int
    n_in: int
    parts: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of its weights."""
        return self.n_out * self.n_in


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer (Llama architecture: RMSNorm, rotary positions, SwiGLU, tied head)."""

    n_layer: Annotated[int, mark("size", checks=LAYERS, weights=True)] = 12
    """Number of transformer blocks."""
    n_head: Annotated[int, mark("size", checks=COUNT, weights=True)] = 12
    """Query heads; the head size is n_embd / n_head."""
    n_kv_head: Annotated[int, mark("size", checks=COUNT, weights=True)] = 3
    """Key/value heads (grouped-query attention); divides n_head."""
    n_embd: Annotated[int, mark("size", checks=COUNT, weights=True)] = 768
    """Width of the residual stream."""
    n_hidden: Annotated[int, mark("size", checks=COUNT, weights=True)] = 2048
    """Width of the SwiGLU hidden layer."""
    rope_base: Annotated[float, mark("shape", checks=(partial(at_least, 1),))] = 10000.0
    """Base of the rotary position frequencies."""
    attention: Annotated[str, mark("shape")] = "full"
    """full, or window:N for a sliding window of N positions; a list such as window:64*3,full is
    dealt out to the layers in turn (here every fourth one is full)."""
    qk_norm: Annotated[bool, mark("method", before=False)] = False
    """Bring queries and keys of every head to a root mean square of 1 (Henry et al. 2020, arXiv
    2010.04245)."""
    embedding_residual: Annotated[bool, mark("method", before=False, weights=True)] = False
    """Feed every block a learned weighted sum of the residual stream and the token embeddings."""
    value_residual: Annotated[ValueResidual, mark("method", before="none", weights=True)] = "none"
    """Add the values of the first layer to the attention values of every later layer, by a learned
    scale (Zhou et al. 2024, arXiv 2410.17897); or nothing."""

    residual_dtype: Annotated[ResidualDtype, mark("precision", before="float32")] = "float32"
    """Precision of the residual stream, the sum that every block adds to. bfloat16 moves a fifth fewer
    bytes between the products of a compiled block, and saves nothing in others; norms still compute in
    float32, and products are in bfloat16 or lower."""

    def __post_init__(self) -> None:
        parse_attention(self.attention)
        check_fields(self)
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
    def layer_patterns(self) -> tuple[AttentionPattern, ...]:
        """The attention pattern of each layer."""
        patterns = parse_attention(self.attention)
        return tuple(patterns[layer % len(patterns)] for layer in range(self.n_layer))

    def has_value_residual(self, layer: int) -> bool:
        """Whether ``layer`` adds to its attention values, see ``value_residual``."""
        return self.value_residual == "first_layer" and layer > 0

    @property
    def receptive_field(self) -> int | None:
        """Positions that can influence an output through all layers; None: all before it."""
        reach = 1
        for pattern in self.layer_patterns:
            if pattern.reach is None:
                return None
            reach += pattern.reach - 1
        return reach

    def matrices(self) -> tuple[Matrix, ...]:
        """The weight matrices of one block, in the order in which the block holds them."""
        key_value = self.n_kv_head * self.head_size
        fused = (
            ("attention.qkv", self.n_embd, (self.n_embd, key_value, key_value)),
            ("attention.out", self.n_embd, (self.n_embd,)),
            ("feed_forward.gate_up", self.n_embd, (self.n_hidden, self.n_hidden)),
            ("feed_forward.down", self.n_hidden, (self.n_embd,)),
        )
        return tuple(Matrix(name, sum(parts), n_in, parts) for name, n_in, parts in fused)

    def parameter_count(self, vocab_size: int) -> int:
        """Number of trained parameters with a vocabulary of ``vocab_size`` (the head is tied)."""
        block = sum(matrix.size for matrix in self.matrices()) + 2 * self.n_embd
        scales = sum(self.has_value_residual(layer) for layer in range(self.n_layer))
        scales += 2 * self.n_layer * self.embedding_residual
        return vocab_size * self.n_embd + self.n_layer * block + self.n_embd + scales
