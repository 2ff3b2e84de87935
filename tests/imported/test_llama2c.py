"""Checkpoints of llama2.c against float64 NumPy, which computes in the order of their own program."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama2c_files import CONTEXT, DIM, HEADS, LAYERS, Weights, angles, draw, legacy, version_1
from score_tokenizers import VOCABULARY, tokenizer_bin
from storylab.errors import UserError
from storylab.imported.folder import import_model, load_imported
from storylab.model.generate import Sampling, generate


def rms(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain


def rotated(x: np.ndarray) -> np.ndarray:
    """``x [T, heads, size]``, neighboring channels turned together as complex numbers."""
    numbers = x[..., 0::2] + 1j * x[..., 1::2]
    numbers = numbers * np.exp(1j * angles(len(x)))[:, None]
    return np.stack((numbers.real, numbers.imag), axis=-1).reshape(x.shape)


def forward(weights: Weights, kv_heads: int, tokens: list[int]) -> np.ndarray:
    """Logits ``[T, V]`` of ``tokens`` in float64, as run.c computes them."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    size, count = DIM // HEADS, len(tokens)
    x = w["tok_embeddings"][tokens]
    hidden = np.triu(np.full((count, count), -np.inf), 1)
    for i in range(LAYERS):
        h = rms(x, w["attention_norm"][i])
        query = rotated((h @ w["wq"][i].T).reshape(count, HEADS, size))
        key = rotated((h @ w["wk"][i].T).reshape(count, kv_heads, size))
        value = (h @ w["wv"][i].T).reshape(count, kv_heads, size)
        heads = []
        for head in range(HEADS):
            shared = head // (HEADS // kv_heads)
            scores = query[:, head] @ key[:, shared].T / np.sqrt(size) + hidden
            chances = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(chances / chances.sum(-1, keepdims=True) @ value[:, shared])
        x = x + np.concatenate(heads, axis=-1) @ w["wo"][i].T
        h = rms(x, w["ffn_norm"][i])
        gate = h @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][i].T)) @ w["w2"][i].T
    return rms(x, w["norm"]) @ w.get("output", w["tok_embeddings"]).T


def stored(folder: Path, data: bytes) -> Path:
    (folder / "stories.bin").write_bytes(data)
    (folder / "tokenizer.bin").write_bytes(tokenizer_bin())
    return folder / "stories.bin"


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("write", [legacy, version_1])
def test_logits_are_those_of_run_c(write: Any, shared: bool, kv_heads: int, tmp_path: Path) -> None:
    weights = draw(kv_heads, shared)
    import_model(stored(tmp_path, write(weights, kv_heads)), tmp_path / "model")
    story_model = load_imported(tmp_path / "model", "cpu")[0]
    assert story_model.block_size == CONTEXT
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, CONTEXT).tolist()
    expected = forward(weights, kv_heads, tokens)
    found = story_model.model(torch.tensor([tokens]))[0].double().numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    stream = generate(
        story_model.model, torch.tensor([[1]]), CONTEXT - 1, Sampling(temperature=0), CONTEXT
    )
    greedy = [1]
    for token in stream:
        greedy.append(int(token))
    best = forward(weights, kv_heads, greedy).argmax(-1)
    assert greedy[1:] == best[:-1].tolist()


def test_a_story_ends_where_the_next_begins(tmp_path: Path) -> None:
    """Its models were trained with the begin alone between stories; --end_id says otherwise."""
    path = stored(tmp_path, legacy(draw(4, True), 4))
    record = import_model(path, tmp_path / "a")
    assert (record.begin_of_text, record.end_of_text, record.kind) == (1, 1, "llama2c")
    assert import_model(path, tmp_path / "b", end=2).end_of_text == 2
    with pytest.raises(UserError, match="--end_id"):
        import_model(path, tmp_path / "c", end=VOCABULARY)


def header(**changes: int) -> bytes:
    sizes = {"dim": 32, "hidden": 40, "layers": 2, "heads": 4, "kv": 4, "ids": VOCABULARY, "t": 24}
    return struct.pack("<7i", *(sizes | changes).values())


WHOLE = legacy(draw(4, True), 4)
HEADER = len(header())


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "too short"),
        (WHOLE[:-4], "its header asks for"),
        (WHOLE + b"\0", "its header asks for"),
        (header(dim=-32) + WHOLE[HEADER:], "n_embd is -32|head_size is -8"),
        (header(heads=0) + WHOLE[HEADER:], "n_heads 0"),
        (header(heads=5) + WHOLE[HEADER:], "dim 32 is not a multiple of n_heads 5"),
        (header(kv=3) + WHOLE[HEADER:], "not a multiple of n_kv_head 3"),
        (header(layers=2**31 - 1) + WHOLE[HEADER:], "n_layer is 2147483647"),
        (header(ids=2**31 - 1, dim=2**30, hidden=2**31 - 1), "its header asks for"),
        (header(t=0) + WHOLE[HEADER:], "context is 0"),
        (b"PK\x03\x04" + WHOLE[4:], "is no checkpoint of llama2.c|is no float32|not a multiple"),
        (struct.pack("<Ii", 0x616B3432, 2) + bytes(300), "has version 2"),
        (struct.pack("<Ii", 0x616B3432, 1) + bytes(20), "ends within its header"),
        (WHOLE[:HEADER] + struct.pack("<f", float("nan")) + WHOLE[HEADER + 4 :], "not finite"),
        (legacy(draw(4, True), 4, base=0.5), "base of its rotary positions is not 10000"),
    ],
)
def test_a_file_that_is_no_such_checkpoint_is_one_line(
    data: bytes, line: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=line) as caught:
        import_model(stored(tmp_path, data), tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_the_tokenizer_may_be_elsewhere(tmp_path: Path) -> None:
    path = stored(tmp_path, WHOLE)
    (tmp_path / "tokenizer.bin").rename(tmp_path / "other.bin")
    with pytest.raises(UserError, match="of the model with --tokenizer"):
        import_model(path, tmp_path / "model")
    record = import_model(path, tmp_path / "model", tmp_path / "other.bin")
    assert record.files.keys() == {"stories.bin", "other.bin"}
