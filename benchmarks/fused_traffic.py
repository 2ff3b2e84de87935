"""Count the bytes that torch.compile's code for a block moves in elementwise work, on any machine.

A plan for a GPU needs them, and a block that keeps all activations, as blocks do on a GPU, can be
compiled for a CPU: the compiler fuses by the same rules. `plan_check.py --count` prints them.
"""

from __future__ import annotations

from typing import Any, get_args
from unittest.mock import patch

import torch
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.graph import GraphLowering

from storylab.config import ModelConfig
from storylab.config.model import ResidualDtype
from storylab.model.transformer import Transformer
from storylab.planning.software import FUSED

TOKENS = (16, 128)


def counted_bytes(model: ModelConfig) -> float:
    """Bytes per token that the kernels of a compiled block read and write, forward and backward, without
    products, attention, and the casts of weights and of their gradients."""
    moved = 0

    def codegen(graph: GraphLowering) -> Any:
        nonlocal moved
        code = written(graph)
        for node in graph.scheduler.nodes:
            if type(node).__name__ not in ("ExternKernelSchedulerNode", "NopKernelSchedulerNode"):
                moved += node.get_read_write_buffers_sizes()
        return code

    written = GraphLowering.codegen
    network = Transformer(model, 300)
    for block in network.blocks:
        block.compile(dynamic=False)
    tokens = torch.zeros(TOKENS, dtype=torch.int64)
    keeps_all = patch("storylab.model.recompute.recomputes_activations", lambda x: False)
    flash = patch("storylab.model.attention.MAX_MATMUL_ATTENTION_LENGTH", 0)
    counting = patch.object(GraphLowering, "codegen", codegen)
    # Code from a cache would not be counted.
    no_caches = inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False)
    with keeps_all, flash, counting, no_caches[0], no_caches[1]:
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            hidden = network.hidden_states(tokens)
        hidden.float().sum().backward()
    # 6 bytes a weight for its cast, 6 for its gradient's.
    weights = 12 * sum(matrix.size for matrix in model.matrices()) * model.n_layer
    return (moved - weights) / tokens.numel() / model.n_layer


def planned_bytes(model: ModelConfig) -> float:
    """The same as a plan counts them."""
    rotated = (model.n_head + model.n_kv_head) * model.head_size
    narrow = (model.residual_dtype == "bfloat16") * FUSED.narrow
    stream = 2 * model.n_embd * (FUSED.norm + FUSED.residual - narrow)
    return stream + rotated * FUSED.rotary + model.n_hidden * FUSED.gate


def print_traffic() -> None:
    """Both counts, for the shape of the original log and for both residual streams."""
    for stream in get_args(ResidualDtype):
        model = ModelConfig(n_layer=1, residual_dtype=stream)
        counted, planned = counted_bytes(model), planned_bytes(model)
        print(f"bytes a token of a block, {stream} stream: {counted:,.0f} in the compiler's code")
        print(f"{'':36}{planned:,.0f} in a plan")
