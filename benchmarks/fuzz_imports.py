"""Files that other programs wrote, as `storylab import` reads them: targets for fuzzing.

A target imports the model, opens it, and measures the loss of two short stories.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from fuzz_changes import Change, change_checkpoint, change_json
from storylab.checksums import CHECKSUMS, add_checksums
from storylab.data.dataset import load_dataset
from storylab.export.bpe import tokenizer_json
from storylab.imported import RECORD, hf, llama2c
from storylab.imported.evaluation import encode_stories, evaluate_stories
from storylab.imported.folder import import_model, load_imported
from storylab.imported.tensors import INDEX, WEIGHTS

STORIES = (b"Tom saw a dog.", "The café é\u2028 was red.\n".encode())
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention"],
    "bos_token_id": 299,
    "eos_token_id": 299,
    "attention_bias": False,
    "hidden_act": "silu",
}
LLAMA2C_SIZES = (8, 12, 1, 2, 1, 260, 16)  # dim, hidden, layers, heads, kv_heads, words, context

ImportTarget = tuple[str, Path, Callable[[], object], Change | None]


def import_targets(data: Path, scratch: Path) -> Iterator[ImportTarget]:
    """The name of each target, its whole file, the code that reads it, and a change that keeps its form.

    Args:
        data: a data set whose vocabulary has 300 tokens.
        scratch: an empty folder.
    """
    model = scratch / "model"
    folder = scratch / "hf"
    write_hf(folder, data)
    read = _reader(folder, model)
    changes: dict[str, Change] = {WEIGHTS: change_checkpoint}
    for name in (hf.CONFIG, WEIGHTS, hf.TOKENIZER, hf.TOKENIZER_CONFIG):
        yield f"import's {name}", folder / name, read, changes.get(name, change_json)
    sharded = scratch / "sharded"
    shutil.copytree(folder, sharded)
    weight_map = dict.fromkeys(
        hf.read_config(folder / hf.CONFIG)[1].tensors(), "model-1.safetensors"
    )
    (sharded / WEIGHTS).rename(sharded / "model-1.safetensors")
    (sharded / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    yield f"import's {INDEX}", sharded / INDEX, _reader(sharded, model), change_json
    checkpoint = scratch / "llama2c" / "model.bin"
    write_llama2c(checkpoint)
    read = _reader(checkpoint, model)
    yield "import's llama2.c model.bin", checkpoint, read, None
    yield "import's llama2.c tokenizer.bin", checkpoint.with_name(llama2c.TOKENIZER), read, None
    imported = scratch / "imported"
    import_model(folder, imported)

    def reopen() -> None:
        (imported / CHECKSUMS).unlink(missing_ok=True)
        # So that the damage meets the checks behind it.
        add_checksums(imported, (WEIGHTS, hf.TOKENIZER, RECORD))
        use_model(imported)

    yield f"import's {RECORD}", imported / RECORD, reopen, change_json


def _reader(source: Path, model: Path) -> Callable[[], None]:
    def read() -> None:
        shutil.rmtree(model, ignore_errors=True)
        import_model(source, model)
        use_model(model)

    return read


def use_model(folder: Path) -> None:
    """Open an imported model and measure its loss, as ``eval`` does."""
    story_model, tokenizer = load_imported(folder, "cpu")
    stories = encode_stories(STORIES, tokenizer)
    evaluate_stories(story_model, stories, min(16, story_model.block_size))


def write_hf(folder: Path, data: Path) -> None:
    """Write a model of `transformers`, with the tokenizer of the data set ``data``."""
    folder.mkdir(parents=True)
    (folder / hf.CONFIG).write_text(json.dumps(CONFIG))
    (folder / hf.TOKENIZER_CONFIG).write_text(json.dumps({"add_bos_token": True}))
    (folder / hf.TOKENIZER).write_text(tokenizer_json(load_dataset(data).tokenizer))
    draw = torch.Generator().manual_seed(1)
    sizes = hf.read_config(folder / hf.CONFIG)[1].tensors()
    save_file(
        {name: torch.randn(size, generator=draw) for name, size in sizes.items()}, folder / WEIGHTS
    )


def write_llama2c(path: Path) -> None:
    """Write a checkpoint of llama2.c's first form, and its ``tokenizer.bin``, by their published layout."""
    dim, hidden, layers, heads, kv_heads, words, context = LLAMA2C_SIZES
    head, keys = dim // heads, kv_heads * dim // heads
    angles = torch.outer(
        torch.arange(context), 10000.0 ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    )
    draw = torch.Generator().manual_seed(1)
    sizes = [
        (words, dim),
        (layers, dim),
        (layers, dim, dim),
        (layers, keys, dim),
        (layers, keys, dim),
    ]
    sizes += [(layers, dim, dim), (layers, dim), *([(layers, hidden, dim)] * 3), (dim,)]
    parts = [*(torch.randn(size, generator=draw) for size in sizes), angles.cos(), angles.sin()]
    path.parent.mkdir(parents=True)
    weights = b"".join(part.float().numpy().tobytes() for part in parts)
    path.write_bytes(struct.pack("<7i", *LLAMA2C_SIZES) + weights)
    tokens = [
        b"<unk>",
        b"\n<s>\n",
        b"\n</s>\n",
        *(b"<0x%02X>" % byte for byte in range(256)),
        b"To",
    ]
    entries = (struct.pack("<fI", 0.0, len(token)) + token for token in tokens)
    longest = struct.pack("<I", max(map(len, tokens)))
    path.with_name(llama2c.TOKENIZER).write_bytes(longest + b"".join(entries))
