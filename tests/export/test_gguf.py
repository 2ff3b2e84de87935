"""Exported files, read by the `gguf` package and run by llama.cpp, against our model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from exported import CONTEXT, SHAPE, source
from storylab.config import ModelConfig
from storylab.errors import UserError
from storylab.export.gguf import EXPORTER, neighbors_rotate
from storylab.export.reference import compare, make_reference
from storylab.record.folder import open_run
from storylab.record.run import Run

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

MODELS: list[dict[str, Any]] = [
    {},
    {"n_kv_head": 1, "rope_base": 10000.0},
    {"qk_norm": True},
    {"attention": f"window:{CONTEXT}"},  # never leaves anything out
]
TYPES = ["f16", "q8_0"]


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def rotated_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Channel i turns with channel i + D/2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)


def rotated_neighbors(x: Tensor, angles: Tensor) -> Tensor:
    """Channel 2i turns with channel 2i + 1."""
    a, b = x[..., 0::2], x[..., 1::2]
    turned = (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


def test_reordered_rows_give_the_same_scores_under_the_other_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    heads, size, width, time = 3, 8, 24, 11

    def projected(rows: Tensor) -> Tensor:
        return (x @ rows.T).unflatten(-1, (heads, size)).transpose(0, 1)

    x = torch.randn(time, width, generator=generator, dtype=torch.float64)
    query, key = torch.randn(2, heads * size, width, generator=generator, dtype=torch.float64)
    angles = torch.arange(time).unsqueeze(1) * 500.0 ** -(torch.arange(size // 2) / (size // 2))
    ours = rotated_halves(projected(query), angles) @ rotated_halves(projected(key), angles).mT
    query, key = (neighbors_rotate(rows, heads) for rows in (query, key))
    theirs = (
        rotated_neighbors(projected(query), angles) @ rotated_neighbors(projected(key), angles).mT
    )
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("changes", MODELS)
def test_the_header_describes_the_model(run: Run, tmp_path: Path, changes: dict[str, Any]) -> None:
    ours = source(run, open_run(run.folder).load_tokenizer(), **changes)
    EXPORTER.write(ours, "f16", tmp_path)
    found, config = fields(tmp_path / "model-f16.gguf"), ours.config
    name = "qwen3" if config.qk_norm else "llama"
    assert found["general.architecture"] == name
    for key, value in {
        "context_length": CONTEXT,
        "embedding_length": 64,
        "block_count": 3,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": config.n_kv_head,
        "rope.dimension_count": 16,
        "rope.freq_base": config.rope_base,
    }.items():
        assert found[f"{name}.{key}"] == value, key
    assert found[f"{name}.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    tokenizer, prefix = ours.tokenizer, "tokenizer.ggml"
    assert (found[f"{prefix}.model"], found[f"{prefix}.pre"]) == ("gpt2", "gpt-2")
    assert len(found[f"{prefix}.tokens"]) == tokenizer.vocab_size
    assert found[f"{prefix}.tokens"][-1] == "<|endoftext|>"
    assert found[f"{prefix}.bos_token_id"] == tokenizer.end_of_text
    assert len(found[f"{prefix}.merges"]) == tokenizer.vocab_size - 257


@pytest.mark.parametrize("weights", TYPES)
def test_tensors_are_the_run_s_rounded(run: Run, tmp_path: Path, weights: str) -> None:
    """Q8_0 by its definition: 32 weights share the float16 scale of their largest, over 127."""
    ours = source(run, open_run(run.folder).load_tokenizer())
    EXPORTER.write(ours, weights, tmp_path)
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / f"model-{weights}.gguf").tensors}
    assert "output.weight" not in read  # tied
    up = ours.weights["blocks.1.feed_forward.gate_up.weight"][96:].numpy()
    stored = read["blk.1.ffn_up.weight"]
    values = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(up.shape)
    if weights == "f16":
        assert np.array_equal(values, up.astype(np.float16).astype(np.float32))
    else:
        blocks = up.reshape(-1, 32)
        scales = np.abs(blocks).max(axis=1, keepdims=True) / 127
        rounded = scales.astype(np.float16).astype(np.float32)
        assert (
            np.abs(values.reshape(-1, 32) - blocks).max()
            <= (rounded * 0.51 + 127 * np.abs(rounded - scales)).max()
        )
    gain = read["blk.1.attn_norm.weight"]
    assert gain.tensor_type == gguf.GGMLQuantizationType.F32
    assert np.array_equal(gain.data, ours.weights["blocks.1.attention_norm.weight"].numpy())
    assert "read back, equal" in EXPORTER.read_back(ours, weights, tmp_path)


def test_another_tensor_is_found(run: Run, tmp_path: Path) -> None:
    ours = source(run, open_run(run.folder).load_tokenizer())
    EXPORTER.write(ours, "f16", tmp_path)
    ours.model.blocks[2].attention.out.weight.data[5, 7] += 0.5
    with pytest.raises(UserError, match=r"blk\.2\.attn_output"):
        EXPORTER.read_back(ours, "f16", tmp_path)


@pytest.mark.parametrize(
    ("changes", "weights", "reason"),
    [
        ({"attention": "window:16"}, "f16", "would drop the window of 16"),
        ({"attention": "full,window:16", "qk_norm": True}, "f16", "qwen3 architecture"),
        ({"n_hidden": 100}, "q8_0", "n_hidden 100 .* --weights f16"),
        ({"value_residual": "first_layer"}, "f16", "--value_residual none"),
    ],
)
def test_a_model_that_llama_cpp_would_change_is_refused(
    changes: dict[str, Any], weights: str, reason: str
) -> None:
    shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "n_hidden": 96} | changes
    with pytest.raises(UserError, match=reason):
        EXPORTER.refuse(ModelConfig(**shape), CONTEXT, weights)


@pytest.mark.slow
@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("changes", MODELS)
def test_llama_cpp_agrees(run: Run, tmp_path: Path, changes: dict[str, Any], weights: str) -> None:
    """Tokens, logits and greedy tokens, and no agreement with a wrong order of rows."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    ours = source(run, open_run(run.folder).load_tokenizer(), **changes)
    EXPORTER.write(ours, weights, tmp_path)
    prompts = make_reference(EXPORTER.as_written(ours, weights), ours.tokenizer, CONTEXT)
    found = compare(EXPORTER.open(tmp_path), prompts, EXPORTER.tolerances[weights])
    assert found.tokens > 0
    ours.model.blocks[0].attention.qkv.weight.data[: SHAPE.n_embd].neg_()
    wrong = make_reference(ours.model, ours.tokenizer, CONTEXT)
    with pytest.raises(UserError, match="differs from our model"):
        compare(EXPORTER.open(tmp_path), wrong, EXPORTER.tolerances[weights])
