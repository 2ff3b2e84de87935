"""The test split: which stories it has, that nothing reads it before a run's end, and that its losses are
right."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from record_folders import forget_checksums
from samples import TINY
from stepping import VOCAB
from storylab.cli import main
from storylab.cli.datasets import describe_dataset
from storylab.config import TrainConfig
from storylab.data import builtin
from storylab.data.dataset import Dataset, Split, fingerprint, load_dataset
from storylab.data.prepare import PrepareConfig, prepare
from storylab.errors import Interrupted, UserError
from storylab.experiments.spec import load_experiment
from storylab.model.transformer import Transformer
from storylab.record import checkpoint
from storylab.record.run import load_run
from storylab.training.observers import Observer
from storylab.training.resume import resume
from storylab.training.train import train

MakeConfig = Callable[..., TrainConfig]


def on_test_side(story: str) -> bool:
    """The rule of docs/guide/data.md."""
    return int(hashlib.sha256(story.encode()).hexdigest(), 16) % 2 == 1


def texts(data: Dataset, split: Split) -> list[str]:
    end = data.tokenizer.end_of_text
    ids = split.read(0, len(split)).tolist()
    borders = [-1, *(i for i, token in enumerate(ids) if token == end)]
    return [data.tokenizer.decode(ids[a + 1 : b]) for a, b in itertools.pairwise(borders)]


def stories_of(data: Dataset) -> dict[str, list[str]]:
    splits = data.splits | ({"test": data.open_test()} if data.has_test else {})
    return {name: texts(data, split) for name, split in splits.items()}


def write_files(folder: Path, **splits: list[str]) -> dict[str, tuple[Path, ...]]:
    files = {}
    for name, stories in splits.items():
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(stories))
        files[name] = (folder / f"{name}.txt",)
    return files


# --- preparing


def test_half_of_the_validation_stories_by_the_hash_of_their_text(dataset: Dataset) -> None:
    raw = list(builtin.stories(0, 0, 300))
    held_out, train = raw[:15], raw[15:]
    expected = {
        "validation": [story for story in held_out if not on_test_side(story)],
        "test": [story for story in held_out if on_test_side(story)],
        "train": [story for story in train if story not in held_out],
    }
    assert stories_of(dataset) == expected
    assert min(map(len, expected.values())) >= 2
    for name, stories in expected.items():
        entry = dataset.manifest["splits"][name]
        assert entry["stories"] == len(stories)
        assert entry["text_bytes"] == sum(len(story.encode()) for story in stories)
    assert dataset.has_test and dataset.manifest["test_origin"] == "hash"


def test_about_half_go_to_test() -> None:
    share = np.mean([on_test_side(story) for story in builtin.stories(1, 0, 4000)])
    assert abs(share - 0.5) < 4 * 0.5 / 4000**0.5


def test_duplicates_and_line_ends_do_not_move_a_story(tmp_path: Path) -> None:
    stories = list(builtin.stories(2, 0, 40))
    files = write_files(tmp_path, train=stories[20:], validation=[*stories[:20], *stories[:9]])
    text = files["validation"][0].read_text()
    files["validation"][0].write_bytes(("  " + text.replace("\n", "\r\n")).encode())
    data = prepare(PrepareConfig(**files, out=tmp_path / "data"))
    found = stories_of(data)
    assert sorted(found["validation"] + found["test"]) == sorted([*stories[:20], *stories[:9]])
    assert not set(found["validation"]) & set(found["test"])
    counted = (data.manifest["splits"][name]["duplicate_stories"] for name in found)
    assert sum(counted) == 9
    assert list(data.manifest["reading"]) == ["train", "validation"]  # one file, counted once


def test_stories_of_train_are_in_neither_held_out_split(tmp_path: Path) -> None:
    stories = list(builtin.stories(3, 0, 60))
    files = write_files(tmp_path, train=stories, validation=stories[:20])
    found = stories_of(prepare(PrepareConfig(**files, out=tmp_path / "data")))
    assert found["train"] == stories[20:]
    kept = prepare(PrepareConfig(**files, out=tmp_path / "kept", keep_overlap=True))
    assert stories_of(kept) == found | {"train": stories}
    counts = {name: len(found[name]) for name in ("validation", "test")}
    overlap = kept.manifest["overlap"]
    assert {name: overlap[f"train_stories_in_{name}"] for name in counts} == counts
    # A tokenizer sees none of them either.
    for name, out in (("a", stories[20:]), ("b", stories)):
        files = write_files(tmp_path, train=out, validation=stories[:20])
        prepare(PrepareConfig(**files, tokenizer="bpe:300", out=tmp_path / name))
    a, b = ((tmp_path / name / "tokenizer.tiktoken").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.slow
def test_own_test_files_leave_validation_whole(tmp_path: Path) -> None:
    """A story in two of the files stays in the one that is held out further."""
    stories = list(builtin.stories(4, 0, 50))
    files = write_files(
        tmp_path, train=stories[:40], validation=stories[35:45], test=stories[38:50]
    )
    data = prepare(PrepareConfig(**files, out=tmp_path / "data"))
    assert stories_of(data) == {
        "train": stories[:35],
        "validation": stories[35:38],
        "test": stories[38:50],
    }
    assert data.manifest["test_origin"] == "files"
    assert data.manifest["overlap"] == {
        "train_stories_in_validation": 3,
        "train_stories_in_test": 2,
        "validation_stories_in_test": 7,
        "left_out": True,
    }
    lines = "\n".join(describe_dataset(data.folder, data.manifest))
    assert "7 validation stories are in test (left out of validation)" in lines
    kept = prepare(PrepareConfig(**files, out=tmp_path / "kept", keep_overlap=True))
    assert stories_of(kept)["validation"] == stories[35:45]
    with pytest.raises(UserError, match="another data set"):
        prepare(PrepareConfig(**(files | {"test": ()}), out=tmp_path / "data"))
    with pytest.raises(UserError, match="--test FILES goes with --train"):
        prepare(PrepareConfig(test=files["test"], out=tmp_path / "other"))


@pytest.mark.slow
@pytest.mark.parametrize("few", ["one", "copies", "one side", "a single test story"])
def test_too_few_validation_stories_are_not_cut(tmp_path: Path, few: str) -> None:
    stories = list(builtin.stories(5, 0, 60))
    test_side = [story for story in stories[:40] if on_test_side(story)]
    other_side = [story for story in stories[:40] if not on_test_side(story)]
    validation = {
        "one": stories[:1],
        "copies": [test_side[0]] * 9 + [other_side[0]] * 9,
        "one side": test_side,
        "a single test story": [*other_side, test_side[0]],
    }[few]
    files = write_files(tmp_path, train=stories[40:], validation=validation)
    data = prepare(PrepareConfig(**files, out=tmp_path / "data"))
    assert not data.has_test and stories_of(data)["validation"] == validation
    lines = describe_dataset(data.folder, data.manifest)
    assert any(line.startswith("test:") and "too few" in line for line in lines)
    two_a_side = [*test_side[:2], *other_side[:2]]
    files = write_files(tmp_path, train=stories[40:], validation=two_a_side)
    assert prepare(PrepareConfig(**files, out=tmp_path / "cut")).has_test


@pytest.mark.slow
def test_the_fingerprint_covers_the_test_split(tmp_path: Path) -> None:
    stories = list(builtin.stories(6, 0, 60))
    made = []
    for name, test in (("a", stories[50:60]), ("b", stories[50:59]), ("c", stories[50:60])):
        files = write_files(tmp_path, train=stories[:40], validation=stories[40:50], test=test)
        made.append(prepare(PrepareConfig(**files, out=tmp_path / name)).fingerprint)
    assert made[0] == made[2] != made[1]


def earlier(data: Dataset, folder: Path) -> Path:
    """The data set as an earlier version would have left it: without a test split."""
    shutil.copytree(data.folder, folder)
    forget_checksums(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in folder.glob("test*"):
        file.unlink()
    del manifest["splits"]["test"], manifest["test_origin"], manifest["reading"]
    manifest["overlap"].pop("train_stories_in_test")
    manifest["overlap"].pop("validation_stories_in_test")
    manifest["format"] = 1
    manifest["fingerprint"] = fingerprint(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_data_of_an_earlier_version_stay_as_they_are(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_config: MakeConfig
) -> None:
    old = earlier(dataset, tmp_path / "old")
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    data = prepare(
        PrepareConfig(source="builtin", tokenizer="bpe:300", out=old, builtin_stories=300)
    )
    assert not data.has_test and list(data.tokens) == ["train", "validation"]
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    flags = ["--source", "builtin", "--tokenizer", "bpe:300", "--builtin_stories", "300"]
    assert main(["prepare", *flags, "--out", str(old)]) == 0
    assert "test:        none: an earlier version prepared" in capsys.readouterr().out
    run = load_run(train(tiny_config(data_dir=old)).folder)
    assert run.test_losses.shape == (0, 2) and run.test_loss is None
    assert run.results.test is None and not (run.folder / "test_losses.npy").exists()


@pytest.mark.parametrize("file", ["test-00000.bin", "test.stories.npy"])
def test_damage_to_the_test_split_is_seen(dataset: Dataset, tmp_path: Path, file: str) -> None:
    shutil.copytree(dataset.folder, tmp_path / "data")
    path = tmp_path / "data" / file
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(UserError, match="altered"):
        load_dataset(tmp_path / "data").open_test()
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        load_dataset(tmp_path / "data")
    if file.endswith(".bin"):
        path.write_bytes(whole[:-2])
        with pytest.raises(UserError, match="truncated"):
            load_dataset(tmp_path / "data")


def test_an_experiment_file_may_name_test_files(tmp_path: Path) -> None:
    text = """
title = "t"
purpose = "p"
[data]
train = ["a.txt"]
validation = ["b.txt"]
test = ["c.txt", "d.txt"]
[arms]
only = { learning_rate = 1e-3 }
"""
    (tmp_path / "x.toml").write_text(text)
    assert load_experiment(tmp_path / "x.toml").data.test == (Path("c.txt"), Path("d.txt"))


# --- training


def plain_losses(data: Dataset, run: Path, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Nats and predicted tokens of every test story, a window at a time, from the weights on disk."""
    tensors, _ = checkpoint.load(run / "checkpoints" / "last.safetensors")
    model = Transformer(TINY, VOCAB, seed=0)
    names = dict(model.named_parameters())
    state = {name: tensors[f"model.{name}"] for name in names}
    model.load_state_dict(state, strict=False)
    split = data.open_test()
    ids = torch.from_numpy(split.read(0, len(split)))
    losses = np.zeros(len(ids))
    for start in [*range(0, len(ids) - 1 - block, block), len(ids) - 1 - block]:
        with torch.no_grad():
            logits = model(ids[None, start : start + block])[0]
        targets = ids[start + 1 : start + block + 1]
        losses[start + 1 : start + block + 1] = F.cross_entropy(logits, targets, reduction="none")
    story = np.cumsum(ids.numpy() == data.tokenizer.end_of_text)
    story = np.concatenate(([0], story[:-1]))
    counts = np.bincount(story)
    counts[0] -= 1  # nothing predicts the first token
    return np.bincount(story, losses), counts


@pytest.mark.slow
def test_the_losses_of_test_stories_equal_a_plain_loop(
    tiny_config: MakeConfig, dataset: Dataset
) -> None:
    run = load_run(train(tiny_config()).folder)
    nats, tokens = plain_losses(dataset, run.folder, 16)
    np.testing.assert_allclose(run.test_losses[:, 0], nats, rtol=1e-4)
    assert run.test_losses[:, 1].tolist() == tokens.tolist()
    assert run.test_loss == pytest.approx(nats.sum() / tokens.sum(), rel=1e-5)
    assert run.results.test is not None and run.results.test.block_size == 16
    assert run.results.test.stories == dataset.manifest["splits"]["test"]["stories"]
    assert run.data.tokens == dataset.tokens


@pytest.mark.slow
def test_nothing_shows_the_loss_of_the_test_split(
    tiny_config: MakeConfig, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the log nor a verb nor the page, with the digits that a loss is printed with."""
    run = load_run(train(tiny_config(out_dir=tmp_path / "runs" / "a")).folder)
    assert run.test_loss is not None and run.results.test is not None
    folder, runs = str(run.folder), ["--runs", str(tmp_path / "runs")]
    verbs = [["list", *runs], ["info", folder], ["eval", folder, "--device", "cpu"]]
    for verb in (*verbs, ["watch", *runs], ["noise", folder]):
        main(verb)
    printed = capsys.readouterr()
    text = printed.out + printed.err + (run.folder / "log.txt").read_text()
    assert f"{run.loss:.4f}" in text
    hidden = run.results.test
    for value in (hidden.loss, hidden.perplexity, hidden.bits_per_byte):
        assert f"{value:.4f}" not in text
    assert "test loss" not in text
    assert main(["eval", folder, "--split", "test"]) == 2


def trained(folder: Path) -> dict[str, Any]:
    """Results of a run that must not depend on a stop."""
    summary = json.loads((folder / "summary.json").read_text())
    names = ("story_losses.npy", "position_losses.npy", "test_losses.npy")
    files = {name: (folder / name).read_bytes() for name in names}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [[row.get(key) for key in ("loss", "val_loss", "train_loss")] for row in rows]
    same = {key: summary[key] for key in ("validation", "test", "samples", "final_val_loss")}
    return files | same | {"rows": losses}


@pytest.mark.slow
def test_training_does_not_open_the_test_split(
    tiny_config: MakeConfig, dataset: Dataset, tmp_path: Path
) -> None:
    """Its shard holds other ids until the end: the run finds out there and not before, and goes on to the
    same bits once the shard is whole again."""
    whole = train(tiny_config(out_dir=tmp_path / "whole"))
    shutil.copytree(dataset.folder, tmp_path / "data")
    shard = tmp_path / "data" / "test-00000.bin"
    ids = shard.read_bytes()
    shard.write_bytes(bytes(len(ids)))
    config = tiny_config(out_dir=tmp_path / "stopped", data_dir=tmp_path / "data")
    with pytest.raises(UserError, match=r"test-00000\.bin is truncated or altered"):
        train(config)
    rows = (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == len((whole.folder / "metrics.jsonl").read_text().splitlines())
    shard.write_bytes(ids)
    assert trained(resume(tmp_path / "stopped").folder) == trained(whole.folder)


class InterruptEvaluation(Observer):
    """Sends this process a signal when the given evaluation begins."""

    def __init__(self, number: int) -> None:
        self.number = number

    def progress(self, name: str, done: int, total: int) -> None:
        if name == "evaluating" and done == 0:
            self.number -= 1
            if self.number == 0:
                signal.raise_signal(signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "fp8"])
def test_a_run_stopped_in_its_last_evaluations_resumes_to_the_same_bits(
    tiny_config: MakeConfig, tmp_path: Path, dtype: str
) -> None:
    """Twice two estimates come first; then, in low precision alone, the validation split in the run's own
    precision; then validation and test."""
    changes = {"dtype": dtype} | ({"backend": "emulated"} if dtype == "fp8" else {})
    model = dataclasses.replace(TINY, n_embd=32, n_hidden=64)
    whole = train(tiny_config(out_dir=tmp_path / "whole", model=model, **changes))
    expected = trained(whole.folder)
    last = 6 + (dtype == "fp8")
    for number in range(5, last + 1):
        out = tmp_path / str(number)
        with pytest.raises(Interrupted):
            train(tiny_config(out_dir=out, model=model, **changes), InterruptEvaluation(number))
        assert not (out / "summary.json").exists() and not (out / "test_losses.npy").exists()
        assert trained(resume(out).folder) == expected
    train(tiny_config(out_dir=tmp_path / "more", **changes), InterruptEvaluation(last + 1))


@pytest.mark.slow
def test_damaged_test_losses_are_refused(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run = train(tiny_config())
    forget_checksums(run.folder)
    path = run.folder / "test_losses.npy"
    table = np.load(path)
    for damaged in (table[:-1], table * [2, 1], table * [1, -1]):
        np.save(path, damaged)
        with pytest.raises(UserError, match=r"test_losses\.npy is not that of its summary"):
            load_run(run.folder)
    path.unlink()
    with pytest.raises(UserError, match=r"test_losses\.npy"):
        load_run(run.folder)
