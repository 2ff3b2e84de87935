"""Folders of `transformers`, computed here, against the library itself; and exports that come back."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exported import CASES, CONTEXT, source
from storylab.errors import UserError
from storylab.export.classes import named_weights
from storylab.export.hf import EXPORTER
from storylab.imported.folder import import_model, load_imported
from storylab.imported.hf import read, read_config
from storylab.imported.model import ImportedModel
from storylab.imported.tensors import INDEX, WEIGHTS
from storylab.model.generate import Sampling, generate
from storylab.record.folder import open_run
from storylab.record.run import Run

SIZES = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
# Each with an option that our own model does not have.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied, another base": (
        "LlamaConfig",
        {"tie_word_embeddings": True, "rope_theta": 500.0, "rms_norm_eps": 0.01},
    ),
    "mistral, wide heads": ("MistralConfig", {"sliding_window": 8, "head_dim": 20}),
    "qwen3": ("Qwen3Config", {"head_dim": 20}),
    "qwen3, windows": (
        "Qwen3Config",
        {
            "head_dim": 12,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without the warnings of a library that we only call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_are_the_librarys(
    name: str, exported: Path, tmp_path: Path
) -> None:
    """At every position and beyond every window, from one file and from several."""
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    kind, options = CONFIGS[name]
    torch.manual_seed(1)
    config = getattr(transformers, kind)(**SIZES, **options, bos_token_id=0, eos_token_id=1)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in theirs.parameters():  # gains included
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "several", max_shard_size="50KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    tokens = torch.randint(320, (2, 80))
    with torch.no_grad():
        expected = theirs(tokens).logits
    for folder in ("one", "several"):
        shutil.copy(exported / "tokenizer.json", tmp_path / folder)
        import_model(tmp_path / folder, tmp_path / f"imported-{folder}")
        model = load_imported(tmp_path / f"imported-{folder}", "cpu")[0].model
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    greedy = theirs.generate(
        tokens[:, :24],
        attention_mask=torch.ones(2, 24, dtype=torch.long),
        max_new_tokens=60,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    stream = generate(model, tokens[:, :24], 60, Sampling(temperature=0), 96)
    assert torch.equal(greedy[:, 24:], torch.stack(list(stream), dim=1))


@pytest.mark.parametrize("case", CASES, ids=[f"{name}-{list(c.values())}" for name, c in CASES])
def test_an_export_comes_back(case: tuple[str, dict[str, Any]], run: Run, tmp_path: Path) -> None:
    """Of every class: the same bits of weights, the same tokens, the same computation."""
    name, changes = case
    ours = source(run, open_run(run.folder).load_tokenizer(), **changes)
    (tmp_path / "hf").mkdir()
    EXPORTER.write(ours, "f32", tmp_path / "hf")
    found = read(tmp_path / "hf")
    assert found.architecture == name
    expected = named_weights(ours.config, ours.weights)
    assert found.weights.keys() == expected.keys()
    assert all(torch.equal(found.weights[key], value) for key, value in expected.items())
    assert found.shape.layer_patterns == ours.config.layer_patterns
    end = ours.tokenizer.end_of_text
    assert (found.begin_of_text, found.end_of_text) == (end, end)
    tokens = torch.randint(end, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, other = ours.model(tokens), ImportedModel(found.shape, found.weights)(tokens)
    torch.testing.assert_close(other, logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))


# Changes to a config, and a part of the line that refuses it.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["GPT2LMHeadModel"]}, "architectures is .*GPT2LMHeadModel"),
    ({"architectures": None}, "architectures is None"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architectures is .*LlamaForCausalLM"),
    ({"rope_theta": None, "rope_parameters": {"rope_theta": [1]}}, "rope_theta is \\[1\\]"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"rope_scaling": {"factor": 8.0, "rope_type": "llama3"}}, "rope_scaling is {'factor': 8.0"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type is 'yarn'"),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5",
    ),
    ({"rope_theta": 9.0}, "rope_theta is 9.0, and another in rope_parameters"),
    ({"auto_map": {"AutoModel": "own.Model"}}, "auto_map is "),
    ({"quantization_config": {"bits": 4}}, "quantization_config is "),
    ({"sliding_window": 16}, "sliding_window: LlamaForCausalLM has no windows"),
    ({"rms_norm_eps": None}, "rms_norm_eps: expected"),
    ({"num_hidden_layers": -1}, "n_layer is -1"),
    ({"num_hidden_layers": 10**12}, "n_layer is 1000000000000"),
    ({"num_attention_heads": 0}, "num_attention_heads 0|n_head is 0"),
    ({"hidden_size": -16}, "n_embd is -16|hidden_size is -16"),
    ({"vocab_size": 10**18}, "vocab_size is 1000000000000000000"),
    ({"vocab_size": 10**6}, "embed_tokens.weight is .*, where config.json needs .1000000"),
    ({"head_dim": 7}, "head_size is 7"),
    ({"num_key_value_heads": 3}, "not a multiple of n_kv_head 3"),
    ({"tie_word_embeddings": False}, "no tensor lm_head.weight"),
    ({"eos_token_id": None}, "eos_token_id is None"),
    ({"num_hidden_layers": 9}, "has no tensor model.layers"),
    ({"num_hidden_layers": 1}, "is a tensor that the model's class does not have"),
    ({"architectures": ["MistralForCausalLM"]}, "sliding_window: is missing"),
    ({"architectures": ["MistralForCausalLM"], "sliding_window": 10**30}, "no size of a window"),
    ({"architectures": ["Qwen3ForCausalLM"]}, "has no tensor .*norm"),
    ({"architectures": ["CwmForCausalLM"]}, "layer_types: is missing"),
]


def altered(exported: Path, folder: Path, **changes: Any) -> Path:
    """A copy of an export with another config."""
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("changes", "line"), REFUSED, ids=[line for _, line in REFUSED])
def test_another_computation_is_refused(
    changes: dict[str, Any], line: str, exported: Path, tmp_path: Path
) -> None:
    folder = altered(exported, tmp_path / "hf", **changes)
    with pytest.raises(UserError, match=line) as caught:
        import_model(folder, tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_windows_of_qwen3_follow_its_flags(exported: Path, tmp_path: Path) -> None:
    """Without use_sliding_window there are none, whatever sliding_window says."""
    base = {"architectures": ["Qwen3ForCausalLM"], "sliding_window": 8, "num_hidden_layers": 2}
    for number, (changes, windows) in enumerate(
        [
            ({}, ()),
            ({"use_sliding_window": True, "max_window_layers": 1}, (None, 8)),
            (
                {
                    "use_sliding_window": True,
                    "layer_types": ["sliding_attention", "full_attention"],
                },
                (8, None),
            ),
        ]
    ):
        folder = altered(exported, tmp_path / str(number), **base, **changes)
        assert read_config(folder / "config.json")[1].windows == windows
    folder = altered(exported, tmp_path / "odd", **base, layer_types=["sliding_attention"] * 2)
    with pytest.raises(UserError, match="use_sliding_window is not true"):
        read_config(folder / "config.json")


def refused(folder: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        import_model(folder, tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (10**15).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{]",
        # An offset beyond the file, a negative size.
        *(
            len(header).to_bytes(8, "little") + header
            for header in (
                b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
                b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}',
                b'{"a":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,0]}}',
            )
        ),
    ],
)
def test_a_damaged_file_of_weights_is_one_line(
    content: bytes, exported: Path, tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path / "hf")
    (tmp_path / "hf" / WEIGHTS).write_bytes(content)
    assert "is not a whole safetensors file" in refused(tmp_path / "hf", tmp_path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", 3, "model.bin"]
)
def test_an_index_leads_nowhere_else(name: Any, exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    shutil.move(folder / WEIGHTS, tmp_path / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert "is not the name of a safetensors file in this folder" in refused(folder, tmp_path)


def changed_weights(exported: Path, folder: Path, **changes: Tensor) -> Path:
    shutil.copytree(exported, folder)
    weights = load_file(folder / WEIGHTS) | changes
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    return folder


def test_weights_that_are_no_weights_are_refused(exported: Path, tmp_path: Path) -> None:
    embedding, norm = (
        load_file(exported / WEIGHTS)["model.embed_tokens.weight"],
        "model.norm.weight",
    )
    width = embedding.shape[1]
    for number, (changes, line) in enumerate(
        [
            ({norm: torch.full((width,), torch.nan)}, f"{norm} has weights that are not finite"),
            ({norm: torch.ones(width, dtype=torch.int8)}, f"{norm} is I8"),
            ({norm: torch.ones(width + 1)}, f"{norm} is .{width + 1}., where"),
            ({"lm_head.weight": embedding + 1}, "tie_word_embeddings is true"),
        ]
    ):
        folder = changed_weights(exported, tmp_path / str(number), **changes)
        with pytest.raises(UserError, match=line):
            import_model(folder, tmp_path / "model")
    same = {"lm_head.weight": embedding.clone(), norm: torch.ones(width, dtype=torch.bfloat16)}
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    found = read(changed_weights(exported, tmp_path / "fine", **same, **rotary))
    assert found.weights[norm].dtype == torch.bfloat16 and "lm_head.weight" not in found.weights


def test_pickles_are_not_opened(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "hf")
    (tmp_path / "hf" / WEIGHTS).rename(tmp_path / "hf/pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refused(tmp_path / "hf", tmp_path)
