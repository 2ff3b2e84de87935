"""Prepare a data set under a progress bar; shared by several verbs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from storylab.cli.console import ConsoleReporter

if TYPE_CHECKING:
    from storylab.data.prepare_config import PrepareConfig


def prepare_and_describe(config: PrepareConfig) -> None:
    """Prepare a data set and print a summary of it."""
    from storylab.data.prepare import prepare

    with ConsoleReporter(count=False) as reporter:
        dataset = prepare(config, reporter.progress)
        for line in describe_dataset(dataset.folder, dataset.manifest):
            reporter.line(line)


def describe_dataset(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Summarize a prepared data set in a few lines."""
    rows = [
        f"{name + ':':<12} {s['stories']:,} stories, {s['tokens']:,} tokens, "
        f"{s['text_bytes']:,} bytes, {s['duplicate_stories']:,} duplicate stories"
        for name, s in manifest["splits"].items()
    ]
    if "test" not in manifest["splits"]:
        rows.append(f"{'test:':<12} {_why_no_test(folder, manifest)}")
    overlap = manifest["overlap"]
    count = overlap.get("train_stories_in_test", 0)
    in_test = f", {count:,} in test" if count else ""
    fate = "left out of train" if overlap["left_out"] else "kept in train"
    tokenizer = manifest["tokenizer"]
    return [
        f"{folder}: {tokenizer['name']} tokenizer, {tokenizer['vocab_size']:,} ids in "
        f"{manifest['dtype']}",
        *rows,
        f"overlap:     {overlap['train_stories_in_validation']:,} train stories are in "
        f"validation{in_test} ({fate})",
        *_validation_overlap(overlap),
        *_reading_lines(manifest),
        f"fingerprint: {manifest['fingerprint']}",
    ]


def _why_no_test(folder: Path, manifest: dict[str, Any]) -> str:
    if manifest.get("test_origin") == "none":
        return (
            "none: the validation stories are too few to give half of them away; prepare more, or give "
            "--test FILES"
        )
    return (
        f"none: an earlier version prepared {folder}, and runs on it stay comparable; for a test split "
        "prepare again into another --out"
    )


def _validation_overlap(overlap: dict[str, Any]) -> list[str]:
    """The validation stories that are test stories too, which only files for each can have."""
    count = overlap.get("validation_stories_in_test", 0)
    fate = "left out of validation" if overlap["left_out"] else "kept in validation"
    return [f"overlap:     {count:,} validation stories are in test ({fate})"] if count else []


def _reading_lines(manifest: dict[str, Any]) -> list[str]:
    """Counts of changed and omitted texts in each split; earlier versions did not record them."""
    from storylab.data.tally import Tally

    return [
        f"{name + ':':<12} {line}"
        for name, counts in manifest.get("reading", {}).items()
        for line in Tally.from_dict(counts).lines()
    ]
