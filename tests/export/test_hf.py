"""Exported folders, opened by `transformers` itself, against our model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exported import CASES, CLASSES, CONTEXT, SHAPE, source
from storylab.config import ModelConfig, preset_config
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.export.classes import model_class
from storylab.export.exporter import Source
from storylab.export.folder import export_run, verify_export
from storylab.export.hf import EXPORTER
from storylab.export.reference import compare, make_reference
from storylab.model.generate import Sampling, generate
from storylab.record.folder import open_run
from storylab.record.run import Run
from storylab.training.sampling import load_story_model
from storylab.training.train import train

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without the warnings of a library that we only call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(params=CASES, ids=[f"{name}-{list(c.values())}" for name, c in CASES])
def case(request: pytest.FixtureRequest, run: Run) -> tuple[str, Source]:
    name, changes = request.param
    tokenizer = open_run(run.folder).load_tokenizer()
    return name, source(run, tokenizer, **changes)


@pytest.mark.slow
def test_logits_and_greedy_tokens_are_ours(case: tuple[str, Source], tmp_path: Path) -> None:
    """At every position, up to the end of the context and beyond every window."""
    name, ours = case
    EXPORTER.write(ours, "f32", tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == name
    assert theirs.dtype == torch.float32
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(ours.tokenizer.end_of_text, (2, CONTEXT), generator=generator)
    with torch.no_grad():
        expected, found = ours.model(tokens), theirs(tokens).logits
    assert float(expected.abs().max()) > 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    prompt = tokens[:, :24]
    stream = generate(ours.model, prompt, CONTEXT - 24, Sampling(temperature=0), CONTEXT)
    greedy = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=CONTEXT - 24,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(greedy[:, 24:], torch.stack(list(stream), dim=1))


@pytest.mark.slow
def test_the_head_is_tied_and_nothing_is_missing(case: tuple[str, Source], tmp_path: Path) -> None:
    _, ours = case
    EXPORTER.write(ours, "f32", tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert torch.equal(theirs.lm_head.weight, ours.model.embedding.weight)
    gains = ours.config.n_layer * 2 * ours.config.head_size * ours.config.qk_norm
    count = ours.config.parameter_count(ours.tokenizer.vocab_size)
    assert sum(p.numel() for p in theirs.parameters()) == count + gains


def test_it_saves_and_opens_again(case: tuple[str, Source], tmp_path: Path) -> None:
    """What `transformers` makes of the config means the same to it: windows, rotary base, tied head."""
    _, ours = case
    EXPORTER.write(ours, "f32", tmp_path)
    first = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    first.save_pretrained(tmp_path / "again")
    second = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    tokens = torch.arange(CONTEXT).remainder(ours.tokenizer.vocab_size).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(first(tokens).logits, second(tokens).logits)


@pytest.mark.parametrize("attention", ["window:15", "window:17", "full"])
@pytest.mark.parametrize("changes", [c for _, c in CASES if "window:16" in c.get("attention", "")])
def test_the_check_finds_a_window_that_is_off_by_one(
    run: Run, tmp_path: Path, changes: dict[str, Any], attention: str
) -> None:
    ours = source(run, open_run(run.folder).load_tokenizer(), **changes)
    EXPORTER.write(ours, "f32", tmp_path)
    pattern = ours.config.attention.replace("window:16", attention)
    other = dataclasses.replace(ours.config, attention=pattern)
    for block, kind in zip(ours.model.blocks, other.layer_patterns, strict=True):
        block.attention.pattern = kind
    prompts = make_reference(ours.model, ours.tokenizer, CONTEXT)
    with pytest.raises(UserError, match="differs from our model on prompt"):
        compare(EXPORTER.open(tmp_path), prompts, EXPORTER.tolerances["f32"])


def test_a_pipeline_writes_our_story(run: Run, tmp_path: Path) -> None:
    story_model = load_story_model(open_run(run.folder), device="cpu")
    ours = Source(run, "last", story_model.model, story_model.tokenizer)
    EXPORTER.write(ours, "f32", tmp_path)
    write = transformers.pipeline("text-generation", model=str(tmp_path))
    for prompt in ("One day Tom", "Lily", "", "Tom<|endoftext|>Once"):
        expected = story_model.sample(prompt, Sampling(temperature=0), max_new_tokens=24)[0]
        story = write(prompt, max_new_tokens=24, do_sample=False)[0]["generated_text"]
        assert story.replace("<|endoftext|>", "") == expected.replace("<|endoftext|>", "")


@pytest.mark.slow
def test_a_run_of_the_portable_method_is_exported_and_verified(
    dataset: Dataset, tmp_path: Path
) -> None:
    """With the command line's defaults of the method."""
    default = preset_config("nano", "portable")
    shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "n_hidden": 48}
    train(
        dataclasses.replace(
            default,
            model=dataclasses.replace(default.model, **shape),
            data_dir=dataset.folder,
            out_dir=tmp_path / "run",
            dtype="float32",
            max_iters=20,
            batch_size=8,
            gradient_accumulation_steps=1,
            block_size=48,
            eval_interval=20,
            eval_iters=1,
            device="cpu",
        )
    )
    folder = tmp_path / "out"
    record = export_run(tmp_path / "run", "hf", None, "last", folder)
    assert record.model_class == "Qwen3ForCausalLM"
    assert any("greedy tokens equal" in line for line in verify_export(folder))
    assert "--method portable" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"value_residual": "first_layer"}, "--value_residual none"),
        ({"embedding_residual": True}, "--no-embedding_residual"),
        ({"attention": "window:8,window:16"}, "one size, such as --attention window:16"),
        ({"attention": "window:1"}, "window of 1"),
    ],
)
def test_a_model_without_a_class_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        model_class(dataclasses.replace(SHAPE, **changes))


def test_every_class_is_tested() -> None:
    shapes = [(name, dataclasses.replace(SHAPE, **changes)) for name, changes in CASES]
    assert all(model_class(shape).architecture == name for name, shape in shapes)
    assert isinstance(shapes[0][1], ModelConfig) and len(CLASSES) == 4
