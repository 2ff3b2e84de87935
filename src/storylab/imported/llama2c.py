"""Checkpoints of llama2.c: one ``.bin`` of float32, of the legacy version or version 1.

The layout is that of ``legacy_export`` and ``version1_export`` in ``export.py`` of
github.com/karpathy/llama2.c, all little-endian. The constants of the model are those of ``run.c``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from storylab.errors import UserError
from storylab.files import exists, open_file, shown
from storylab.imported.score_tokenizer import BEGIN, read_score_tokenizer
from storylab.imported.shape import EMBEDDING, HEAD, NORM, ImportedShape
from storylab.imported.source import Source, require_finite

TOKENIZER = "tokenizer.bin"
ROPE_BASE, NORM_EPSILON = 10000.0, 1e-5
MAGIC = 0x616B3432  # "ak42"
_LEGACY, _VERSION_1 = struct.Struct("<7i"), struct.Struct("<Ii7iB")
VERSION_1_HEADER = 256
# Weights of a layer, by the names of `transformers`.
QUERY, KEY, VALUE = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
ATTENTION = (QUERY, KEY, VALUE, "self_attn.o_proj")
FEED_FORWARD = ("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")  # w1, w2, w3
NORMS = ("input_layernorm", "post_attention_layernorm")
# The orders in which files have the weights; a name of a layer means those of all layers in turn.
LEGACY_ORDER = (EMBEDDING, NORMS[0], *ATTENTION, NORMS[1], *FEED_FORWARD, NORM)
VERSION_1_ORDER = (*NORMS, NORM, EMBEDDING, *ATTENTION, *FEED_FORWARD)
# Largest difference of a cosine or sine in the tables of the legacy version; they are in float32.
TABLE_ROUNDING = 1e-2


@dataclass(frozen=True)
class Layout:
    """Where the weights are in a file.

    Attributes:
        shape: of the model.
        start: bytes before the first weight.
        order: names of the weights in turn.
        tables: whether cosines and sines of the rotary positions come after those, before the head.
    """

    shape: ImportedShape
    start: int
    order: tuple[str, ...]
    tables: bool

    @property
    def table(self) -> tuple[int, int]:
        """Shape of a table: positions and frequencies."""
        return self.shape.context, self.shape.head_size // 2

    def parts(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each array in the file, in order."""
        shapes = self.shape.tensors()
        for name in self.order:
            if name in shapes:
                yield name, shapes[name]
                continue
            for layer in range(self.shape.n_layer):
                full = f"model.layers.{layer}.{name}.weight"
                yield full, shapes[full]
        if self.tables:
            yield from (("cosines", self.table), ("sines", self.table))
        if not self.shape.tied_head:
            yield HEAD, shapes[HEAD]


def read(path: Path, tokenizer: Path | None = None) -> Source:
    """Read the checkpoint ``path``.

    Args:
        path: the ``.bin`` file.
        tokenizer: its tokenizer.bin; by default the one in the same folder.

    Raises:
        UserError: a file is missing, damaged, or of another version.
    """
    with open_file(path) as file:
        data = file.read()
    layout = _layout(data[:VERSION_1_HEADER], path)
    size = layout.start + 4 * sum(prod(shape) for _, shape in layout.parts())
    if len(data) != size:
        raise UserError(
            f"{shown(path)} has {len(data):,} bytes, and its header asks for {size:,}: it is no float32 "
            "checkpoint of llama2.c, or not whole"
        )
    weights = _weights(data, layout, path)
    place = tokenizer or path.with_name(TOKENIZER)
    if not exists(place):
        raise UserError(
            f"{shown(place)} is missing: give the tokenizer.bin of the model with --tokenizer"
        )
    with open_file(place) as file:
        content = file.read()
    read_score_tokenizer(content, place, layout.shape.vocab_size, BEGIN, BEGIN)
    return Source(
        architecture="llama2.c",
        shape=layout.shape,
        weights=weights,
        tokenizer_file=TOKENIZER,
        tokenizer=content,
        # Its stories were trained on with the begin alone between them (tinystories.py).
        begin_of_text=BEGIN,
        end_of_text=BEGIN,
        files=(path, place),
    )


def _layout(header: bytes, path: Path) -> Layout:
    """The layout of a file that begins with ``header``."""
    if len(header) < _LEGACY.size:
        raise UserError(f"{shown(path)} is no checkpoint of llama2.c: it is too short")
    version, tied = 0, False
    if int.from_bytes(header[:4], "little") == MAGIC:
        if len(header) < _VERSION_1.size:
            raise UserError(f"{shown(path)} ends within its header: get it again")
        _, version, *sizes, flag = _VERSION_1.unpack_from(header)
        if version != 1:
            raise UserError(
                f"{shown(path)} has version {version}: storylab reads the legacy version and version 1, in "
                "float32"
            )
        tied = bool(flag)
    else:
        sizes = list(_LEGACY.unpack_from(header))
        sizes[5], tied = abs(sizes[5]), sizes[5] > 0
    width, hidden, layers, heads, kv_heads, vocabulary, context = sizes
    if heads < 1 or width % heads:
        raise UserError(f"{shown(path)}: dim {width} is not a multiple of n_heads {heads}")
    try:
        shape = ImportedShape(
            vocab_size=vocabulary,
            n_layer=layers,
            n_head=heads,
            n_kv_head=kv_heads,
            head_size=width // heads,
            n_embd=width,
            n_hidden=hidden,
            context=context,
            rope_base=ROPE_BASE,
            norm_epsilon=NORM_EPSILON,
            tied_head=tied,
        )
    except UserError as error:
        raise UserError(f"{shown(path)} is no checkpoint of llama2.c: {error}") from error
    if version == 1:
        return Layout(shape, VERSION_1_HEADER, VERSION_1_ORDER, tables=False)
    return Layout(shape, _LEGACY.size, LEGACY_ORDER, tables=True)


def _weights(data: bytes, layout: Layout, path: Path) -> dict[str, Tensor]:
    """The weights in ``data``, queries and keys in the order of `transformers`.

    Raises:
        UserError: weights are not finite, or the rotary positions have another base.
    """
    found, at = {}, layout.start
    for name, size in layout.parts():
        values = np.frombuffer(data, "<f4", prod(size), at).reshape(size)
        found[name], at = torch.from_numpy(values.astype(np.float32)), at + values.nbytes
    require_finite(found, path)
    if layout.tables:
        _require_base(found.pop("cosines"), found.pop("sines"), path)
    shape = layout.shape
    for layer in range(shape.n_layer):
        for part, heads in ((QUERY, shape.n_head), (KEY, shape.n_kv_head)):
            name = f"model.layers.{layer}.{part}.weight"
            # Neighboring channels rotate together there, halves of a head here.
            pairs = found[name].view(heads, shape.head_size // 2, 2, shape.n_embd)
            found[name] = pairs.transpose(1, 2).reshape(found[name].shape).contiguous()
    return found


def _require_base(cosines: Tensor, sines: Tensor, path: Path) -> None:
    """Raise a UserError if the tables of the rotary positions, ``[T, D / 2]``, have another base."""
    positions, half = cosines.shape
    frequencies = ROPE_BASE ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(positions, dtype=torch.float64).unsqueeze(1) * frequencies
    for table, expected in ((cosines, angles.cos()), (sines, angles.sin())):
        if not torch.allclose(table.double(), expected, rtol=0, atol=TABLE_ROUNDING):
            raise UserError(
                f"{shown(path)}: the base of its rotary positions is not 10000, and run.c would use 10000: "
                "it is not clear which is meant"
            )
