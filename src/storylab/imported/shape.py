"""The shape of an imported model, and the tensors that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from storylab.config import FULL, AttentionPattern, Window
from storylab.config.marks import COUNT, MOST, at_least, at_most, check_fields, mark
from storylab.config.model import LAYERS
from storylab.errors import UserError

# The norms of a block, by the names of `transformers`.
BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# Ids fit into 32 bits.
VOCABULARY = (*COUNT, partial(at_most, 2**31 - 1))
# Greater ones leave nothing of a state.
EPSILON = (partial(at_least, 0), partial(at_most, 1))


@dataclass(frozen=True)
class ImportedShape:
    """Shape of a model of the Llama family, with the options that our own model does not have: a head of
    its own, heads of any width, gains in the norms of queries and keys, another epsilon.

    Its fields are marked as those of a run's config are, for the checks; none is a flag.
    """

    vocab_size: Annotated[int, mark("size", checks=VOCABULARY)]
    """Number of token ids, V."""
    n_layer: Annotated[int, mark("size", checks=LAYERS)]
    """Number of blocks."""
    n_head: Annotated[int, mark("size", checks=COUNT)]
    """Query heads."""
    n_kv_head: Annotated[int, mark("size", checks=COUNT)]
    """Key/value heads; divides n_head."""
    head_size: Annotated[int, mark("size", checks=COUNT)]
    """Width of a head; even."""
    n_embd: Annotated[int, mark("size", checks=COUNT)]
    """Width of the residual stream."""
    n_hidden: Annotated[int, mark("size", checks=COUNT)]
    """Width of the SwiGLU hidden layer."""
    context: Annotated[int, mark("sequence", checks=COUNT)]
    """Greatest number of tokens that the model was made to read at once."""
    rope_base: Annotated[float, mark("shape", checks=(partial(at_least, 1),))]
    """Base of the rotary position frequencies."""
    norm_epsilon: Annotated[float, mark("shape", checks=EPSILON)]
    """Added to the mean square in every norm."""
    tied_head: Annotated[bool, mark("shape")]
    """Whether the head is the embedding."""
    qk_norm: Annotated[bool, mark("shape")] = False
    """Whether queries and keys of every head have a norm with gains."""
    windows: Annotated[tuple[int | None, ...], mark("shape")] = ()
    """Size of the attention window of every layer, None for full attention; empty: all are full."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.head_size % 2:
            raise UserError(f"head_size is {self.head_size}: rotary positions need an even number")
        if self.n_head % self.n_kv_head:
            raise UserError(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}: "
                "query heads share key/value heads in equal groups"
            )
        if self.windows and len(self.windows) != self.n_layer:
            raise UserError(f"windows are {len(self.windows)}: there are {self.n_layer} layers")
        for size in self.windows:
            if size is not None and not 1 <= size <= MOST:
                raise UserError(f"windows: {size} is no size of a window")

    @property
    def layer_patterns(self) -> tuple[AttentionPattern, ...]:
        """The attention pattern of each layer."""
        windows = self.windows or (None,) * self.n_layer
        return tuple(FULL if size is None else Window(size) for size in windows)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights by the names of `transformers`."""
        width, queries = self.n_embd, self.n_head * self.head_size
        keys = self.n_kv_head * self.head_size
        matrices = {
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (self.n_hidden, width),
            "mlp.up_proj": (self.n_hidden, width),
            "mlp.down_proj": (width, self.n_hidden),
        }
        block: dict[str, tuple[int, ...]] = {**matrices, **dict.fromkeys(BLOCK_NORMS, (width,))}
        if self.qk_norm:
            block |= dict.fromkeys(QK_NORMS, (self.head_size,))
        found: dict[str, tuple[int, ...]] = {
            EMBEDDING: (self.vocab_size, width),
            NORM: (width,),
        }
        for layer in range(self.n_layer):
            found |= {f"model.layers.{layer}.{name}.weight": size for name, size in block.items()}
        return found if self.tied_head else {**found, HEAD: (self.vocab_size, width)}
