"""The model card: metadata that the hub reads, and every number from the record."""

from __future__ import annotations

import dataclasses
import re
import shlex
from typing import Any

import msgspec
import pytest
from huggingface_hub import ModelCard

from exported import source
from storylab.cli.verbs.train import TrainCommand
from storylab.config import METHODS, PRESENTATION_FIELDS, TrainConfig, flat, preset_config
from storylab.data.prepare import PrepareConfig
from storylab.export.card import model_card, train_command
from storylab.export.hf import EXPORTER
from storylab.flags import default_for, parse
from storylab.record.folder import open_run
from storylab.record.run import Run
from storylab.record.schema import Sample


def card(run: Run, **changes: Any) -> str:
    ours = source(run, open_run(run.folder).load_tokenizer(), **changes)
    return model_card(ours, EXPORTER, "f32", ["checked"])


def with_summary(run: Run, **changes: Any) -> Run:
    return dataclasses.replace(run, summary=msgspec.structs.replace(run.results, **changes))


def test_the_hub_reads_the_metadata(run: Run) -> None:
    data = ModelCard(card(run)).data
    assert (data.language, data.library_name, data.pipeline_tag) == (
        "en", "transformers", "text-generation",
    )  # fmt: skip
    assert data.eval_results and data.model_name == run.folder.name
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values["cross_entropy_loss"] == pytest.approx(run.loss, abs=1e-5)
    assert values["bits_per_byte"] == pytest.approx(run.validation.bits_per_byte, abs=1e-5)


def test_intervals_are_those_of_the_record_or_missing(run: Run) -> None:
    split = run.validation
    assert split.standard_error is not None
    half = 1.96 * split.standard_error
    low, high = split.loss - half, split.loss + half
    text = card(run)
    assert f"| {split.loss:.4f} ({low:.4f} to {high:.4f}) |" in text
    ratio = split.bits_per_byte / split.loss
    assert f"| {split.bits_per_byte:.4f} ({low * ratio:.4f} to {high * ratio:.4f}) |" in text
    bare = msgspec.structs.replace(split, standard_error=None)
    assert f"| {split.loss:.4f} | {split.bits_per_byte:.4f} |" in card(
        with_summary(run, validation=bare)
    )


def test_the_test_split_stays_closed(run: Run) -> None:
    test = run.results.test
    assert test is not None
    changed = with_summary(
        run, test=msgspec.structs.replace(test, loss=1.2345678, bits_per_byte=0.98765)
    )
    assert "1.2345" not in card(changed) and "0.9876" not in card(changed)


def test_energy_and_diverged_runs(run: Run) -> None:
    assert "energy: not measured" in card(run)
    assert "energy: 2.0 Wh of the GPU" in card(with_summary(run, energy_joules=7200.0))
    text = card(dataclasses.replace(with_summary(run, status="diverged"), state="diverged"))
    assert "The run is diverged" in text and "model-index" not in text


def test_a_sample_stays_in_its_fence(run: Run) -> None:
    story = "He said:\n```\n# Not a heading\x1b[31m"
    text = card(with_summary(run, samples=[Sample(prompt="He", text=story)]))
    assert "````text\nHe said:\n```\n# Not a heading\ufffd[31m\n````\n" in text


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        (
            {"name": "tinystories", "repo": "roneneldan/TinyStories", "revision": "f54c09fd2331"},
            [
                "licensed CDLA-Sharing-1.0",
                "datasets:\n- roneneldan/TinyStories",
                "at revision f54c09",
            ],
        ),
        ({"name": "files", "files": {}}, ["does not know their license", "--train FILES"]),
        ({"name": "x", "repo": "<b>evil</b>"}, ["does not know their license"]),
    ],
)
def test_data_and_license(run: Run, origin: dict[str, Any], words: list[str]) -> None:
    data = msgspec.structs.replace(run.data, request={"source": origin})
    text = card(dataclasses.replace(run, data=data))
    assert all(word in text for word in words) and "evil" not in text


def test_programs_that_ignore_windows_are_named(run: Run) -> None:
    assert "ignore" not in card(run)
    text = card(run, attention="window:16", qk_norm=True)
    assert (
        "vllm-project/vllm/issues/39514" in text and "windows of 16 tokens in every layer" in text
    )
    assert "all layers but 3" in card(run, attention="window:16*2,full")


@pytest.mark.parametrize("method", METHODS)
def test_the_commands_make_the_same_run(run: Run, method: str) -> None:
    default = preset_config("3m", method)
    config = dataclasses.replace(
        default,
        data_seed=7,
        compile=False,
        max_iters=77,
        dtype="float32",
        model=dataclasses.replace(default.model, attention="window:8*2,full", rope_base=500.0),
    )
    words = shlex.split(train_command(dataclasses.replace(run, config=config)))
    again = parse(TrainCommand, words[2:], "x", TrainCommand(default_for(words[2:]))).config
    assert words[:2] == ["storylab", "train"]
    assert flat(again, PRESENTATION_FIELDS) == flat(config, PRESENTATION_FIELDS)
    prepare = re.search(r"^storylab prepare (.*)$", card(run), re.MULTILINE)
    assert prepare is not None
    found = parse(PrepareConfig, shlex.split(prepare[1]), "x")
    assert (found.source, found.tokenizer, found.builtin_stories) == ("builtin", "bpe:300", 300)
    assert f"--data_dir {found.folder.as_posix()}" in train_command(run)
    assert isinstance(config, TrainConfig)
