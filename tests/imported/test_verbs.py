"""Imported models in `eval`, `sample` and `compare`, beside the run that one of them comes from."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import storylab
from llama2c_files import CONTEXT, draw, legacy
from score_tokenizers import tokenizer_bin
from storylab.checksums import add_checksums
from storylab.cli import main
from storylab.data.dataset import Dataset
from storylab.data.layout import VALIDATION
from storylab.documents import DOCUMENTS
from storylab.errors import UserError
from storylab.imported import RECORD
from storylab.imported.evaluation import encode_stories, evaluate_imported, story_texts
from storylab.imported.folder import import_model, load_imported
from storylab.imported.tensors import WEIGHTS
from storylab.model.generate import Sampling
from storylab.record.run import Run
from storylab.training.evaluation import evaluate_run


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported model of llama2.c, with random weights and another tokenizer."""
    folder = tmp_path_factory.mktemp("llama2c")
    (folder / "stories.bin").write_bytes(legacy(draw(2, shared=False), 2))
    (folder / "tokenizer.bin").write_bytes(tokenizer_bin())
    import_model(folder / "stories.bin", folder / "model")
    return folder / "model"


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert main(list(map(str, args))) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def document(capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    assert main([*map(str, args), "--json"]) == 0
    return msgspec.json.decode(capsys.readouterr().out, type=DOCUMENTS[str(args[0])])


def test_losses_of_an_export_that_came_back_are_the_runs(
    run: Run, imported: Path, dataset: Dataset
) -> None:
    """Story by story, but for the very first token: in our data nothing comes before it."""
    ours = evaluate_run(run.folder, device="cpu", aligned=True)
    theirs, lossy = evaluate_imported(*load_imported(imported, "cpu"), dataset)
    assert (lossy, theirs.block_size, theirs.text_bytes) == (0, 48, ours.text_bytes)
    assert theirs.story_tokens[0] == ours.story_tokens[0] + 1
    assert np.array_equal(theirs.story_tokens[1:], ours.story_tokens[1:])
    np.testing.assert_allclose(theirs.story_losses[1:], ours.story_losses[1:], rtol=1e-5)


def by_hand(folder: Path, text: str, window: int) -> tuple[float, int]:
    """Nats and tokens of one story, a window at a time."""
    story_model, tokenizer = load_imported(folder, "cpu")
    ids = [1, *tokenizer.encode(text), 1]
    nats = 0.0
    for start in range(0, len(ids) - 1, window):
        read = ids[start : start + window + 1]
        logits = story_model.model(torch.tensor([read[:-1]]))[0]
        nats += float(F.cross_entropy(logits, torch.tensor(read[1:]), reduction="sum"))
    return nats, len(ids) - 1


@pytest.mark.parametrize("window", [None, 7])
def test_another_tokenizers_losses_are_those_of_each_story(
    other: Path, dataset: Dataset, window: int | None
) -> None:
    found, lossy = evaluate_imported(*load_imported(other, "cpu"), dataset, block_size=window)
    texts = list(story_texts(dataset.splits[VALIDATION], dataset.tokenizer))
    assert lossy == 0 and len(texts) == len(found.story_losses)
    assert found.text_bytes == sum(map(len, texts)) == dataset.splits[VALIDATION].text_bytes
    for number in (0, 1, len(texts) - 1):
        nats, tokens = by_hand(other, texts[number].decode(), window or CONTEXT)
        assert found.story_tokens[number] == tokens
        assert found.story_losses[number] == pytest.approx(nats, rel=1e-5)
    bits = found.story_losses.sum() / math.log(2) / found.text_bytes
    assert found.bits_per_byte == pytest.approx(bits)
    assert found.position_losses.shape == (window or CONTEXT,)


def test_eval_reads_stories_from_a_data_set(
    imported: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give a data set with --data_dir" in fails(capsys, "eval", imported)
    place = ("eval", imported, "--data_dir", dataset.folder, "--device", "cpu")
    assert "no best checkpoint" in fails(capsys, *place, "--checkpoint", "best")
    assert "the model reads 1 to 48 tokens" in fails(capsys, *place, "--block_size", 49)
    found = document(capsys, *place)
    expected, _ = evaluate_imported(*load_imported(imported, "cpu"), dataset)
    assert found.bits_per_byte == pytest.approx(expected.bits_per_byte)
    assert (found.checkpoint, found.aligned, found.lossy_stories) == ("imported", True, 0)
    assert main(list(map(str, place))) == 0
    text = capsys.readouterr().out
    assert "windows of 48 tokens" in text and "start again at every story" in text
    assert f"bits per byte  {expected.bits_per_byte:.4f}" in text


def test_samples_are_measured_in_the_ids_of_the_data_set(
    other: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ("eval", other, "--data_dir", dataset.folder, "--device", "cpu")
    found = document(capsys, *place, "--samples", 3, "--max_new_tokens", 20)
    texts = load_imported(other, "cpu")[0].sample("", Sampling(), 20, 3)
    ids = [dataset.tokenizer.encode(text.removeprefix(" ")) for text in texts]
    assert found.samples.written.tokens == sum(map(len, ids))
    assert found.samples.written.distinct_1 == len(set().union(*ids)) / sum(map(len, ids))


def test_sample_writes_the_runs_story(
    run: Run, imported: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--prompt", "One day Tom", "--temperature", "0", "--max_new_tokens", "30"]
    stories = []
    for folder in (run.folder, imported):
        assert main(["sample", str(folder), *flags, "--device", "cpu"]) == 0
        stories.append(capsys.readouterr().out)
    assert stories[0] == stories[1] and len(stories[0]) > 20
    assert main(["sample", str(other), *flags, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("One day Tom")
    model = storylab.load_model(imported, device="cpu")
    story = model.sample("One day Tom", Sampling(temperature=0), 30)[0]
    assert stories[0].startswith(story)


def test_compare_gives_bits_per_byte_of_the_same_stories(
    run: Run,
    imported: Path,
    other: Path,
    dataset: Dataset,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = document(capsys, "compare", run.folder, imported, other)
    ours, same, random = found.models
    assert [model.imported for model in found.models] == [False, True, True]
    assert same.difference_bits_per_byte == pytest.approx(0, abs=1e-5)
    assert found.comparisons == [] and found.experiment is None
    assert ours.difference_bits_per_byte == ours.low_bits_per_byte == 0
    # By hand, without the first story; the interval is that of a ratio of sums.
    a = evaluate_run(run.folder, device="cpu", aligned=True).story_losses[1:] / math.log(2)
    b = evaluate_imported(*load_imported(other, "cpu"), dataset)[0].story_losses[1:] / math.log(2)
    texts = [len(t) for t in story_texts(dataset.splits[VALIDATION], dataset.tokenizer)][1:]
    assert ours.bits_per_byte == pytest.approx(a.sum() / sum(texts))
    difference = (b - a).sum() / sum(texts)
    assert random.difference_bits_per_byte == pytest.approx(difference)
    draws = np.random.default_rng(0).integers(0, len(a), (2000, len(a)))
    resampled = (b - a)[draws].sum(axis=1) / np.array(texts)[draws].sum(axis=1)
    width = random.high_bits_per_byte - random.low_bits_per_byte
    n = len(a)
    error = resampled.std() * math.sqrt(n / (n - 1))
    assert width == pytest.approx(2 * stats.t.ppf(0.975, n - 1) * error, rel=0.1)
    assert random.low_bits_per_byte < difference < random.high_bits_per_byte


def test_compare_says_what_it_is(
    run: Run,
    imported: Path,
    other: Path,
    dataset: Dataset,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = fails(capsys, "compare", imported, other)
    assert "give a data set with --data_dir" in line
    for flags in (["--exit_code"], ["--margin", "0.1"]):
        assert "an imported model has none" in fails(capsys, "compare", run.folder, other, *flags)
    assert "are for imported models" in fails(
        capsys, "compare", run.folder, run.folder.parent, "--data_dir", dataset.folder
    ).replace("is for", "are for")
    assert main(["compare", str(imported), str(other), "--data_dir", str(dataset.folder)]) == 0
    text = capsys.readouterr().out
    assert "This compares models, not recipes" in text and "windows of 24 tokens, imported" in text


def test_stories_that_a_tokenizer_changes_are_counted(imported: Path) -> None:
    class Lower:
        begin_of_text = end_of_text = 0

        def encode_stories(self, stories: list[str]) -> list[list[int]]:
            return [list(story.lower().encode()) for story in stories]

        def decode_bytes(self, ids: list[int]) -> bytes:
            return bytes(ids)

    found = encode_stories([b"tom", b"Tom", b"\xff"], Lower())  # type: ignore[arg-type]
    assert found.lossy == 2


def test_the_record_says_where_it_comes_from(imported: Path, exported: Path) -> None:
    record = json.loads((imported / RECORD).read_text())
    assert record["source"] == str(exported) and record["kind"] == "hf"
    assert record["files"].keys() == {"config.json", "model.safetensors", "tokenizer.json"}
    model = load_imported(imported, "cpu")[0].model
    assert record["parameters"] == sum(value.numel() for value in model.parameters())


def test_what_was_changed_or_is_there_is_refused(
    imported: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (WEIGHTS, "tokenizer.json", RECORD):
        folder = tmp_path / name
        shutil.copytree(imported, folder)
        data = bytearray((folder / name).read_bytes())
        data[-3] ^= 1
        (folder / name).write_bytes(data)
        assert name in fails(capsys, "sample", folder)
    for key in ("begin_of_text", "end_of_text"):
        folder = tmp_path / key
        shutil.copytree(imported, folder)
        values = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(json.dumps(values | {key: values["shape"]["vocab_size"]}))
        add_checksums(folder, (RECORD,))  # as one who made it up would
        assert RECORD in fails(capsys, "sample", folder)
    assert "not an empty folder" in fails(capsys, "import", exported, "--out_dir", imported)
    assert "cannot read" in fails(capsys, "import", tmp_path / "x", "--out_dir", tmp_path / "y")
    assert main(["import", str(exported), "--out_dir", str(tmp_path / "new")]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no imported model"):
        load_imported(exported)
