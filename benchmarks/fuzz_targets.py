"""The files that storylab reads, each with the code that reads it: targets for fuzzing.

A target takes the bytes of a file, puts them where a whole file was, and reads it as a command would. It
may raise a :class:`storylab.errors.UserError`; anything else is a finding. To fuzz another file, add an
entry to :func:`targets`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fuzz_changes import Change, change_checkpoint, change_json, change_manifest, change_toml
from fuzz_imports import import_targets
from storylab.checksums import CHECKSUMS, read_checksums
from storylab.config import TrainConfig
from storylab.data.dataset import MANIFEST, TOKENIZER_FILE, fingerprint, load_dataset
from storylab.data.prepare import PrepareConfig, prepare
from storylab.data.reading import clean, read_texts
from storylab.data.tally import Tally
from storylab.data.tokenizer import load_tokenizer
from storylab.experiments.experiment import Experiment
from storylab.experiments.plan import plan_runs
from storylab.experiments.recording import write_record
from storylab.experiments.records import read_experiment
from storylab.experiments.spec import load_experiment
from storylab.export.folder import RECORD, read_export
from storylab.files import read_record
from storylab.flags import parse
from storylab.record import checkpoint
from storylab.record.folder import (
    CONFIG,
    DATA,
    ENVIRONMENT,
    METRICS,
    POSITION_LOSSES,
    PRECISION,
    STORY_LOSSES,
    SUMMARY,
    RunFolder,
)
from storylab.record.index import list_run
from storylab.record.run import load_run
from storylab.record.schema import PrecisionInfo

EXPERIMENT = """
title = "Two rates"
purpose = "Which is better?"
hypothesis = "The high one"
factor = "learning_rate"
baseline = "low"
seeds = [1, 2]
looks = [2, 3]
margin = 0.02
[data]
source = "builtin"
tokenizer = "bpe:300"
builtin_stories = 300
[config]
preset = "nano"
n_layer = 1
n_head = 1
n_kv_head = 1
n_embd = 16
n_hidden = 16
dtype = "fp8"
backend = "emulated"
quantization_stats = true
max_iters = 2
batch_size = 4
gradient_accumulation_steps = 1
block_size = 16
warmup_iters = 1
eval_interval = 2
eval_iters = 1
device = "cpu"
[arms]
low = { learning_rate = 1e-3 }
high = { learning_rate = 1e-2 }
[[expect]]
text = "it is better"
metric = "loss_difference"
arm = "high"
at_most = 0.0
[scales.laptop]
seeds = [1, 2, 3]
"""
FACTORS = """
title = "Factors"
purpose = "Which matter?"
seeds = [1, 2]
[config]
preset = "nano"
max_iters = 2
[factors]
rate = { low = { learning_rate = 1e-3 }, high = { learning_rate = 1e-2 } }
decay = { none = { weight_decay = 0.0 }, some = { weight_decay = 0.1 } }
"""
MOST = 1 << 14  # bytes of an input, unless the whole file is longer


@dataclass(frozen=True)
class Example:
    """A data set, a finished run on it, and an experiment's file and record, all whole."""

    data: Path
    run: Path
    spec: Path
    record: Path


@dataclass(frozen=True)
class Target:
    """A kind of file: whole ones to begin with, its reader, and a change that leaves it of its form."""

    seeds: Sequence[bytes]
    read: Callable[[bytes], object]
    change: Change | None = None


def make_example(root: Path) -> Example:
    """Prepare a small data set, train a small model on it, and record an experiment in ``root``."""
    from storylab.training.train import train

    data = root / "data"
    config = PrepareConfig(source="builtin", tokenizer="bpe:300", out=data, builtin_stories=300)
    dataset = prepare(config)
    spec = root / "rates.toml"
    spec.write_text(EXPERIMENT, encoding="utf-8")
    experiment: Experiment = load_experiment(spec, "laptop")
    planned = plan_runs(experiment, dataset, root / "runs")
    record = write_record(experiment, dataset, planned, root / "runs")
    return Example(data, train(planned[0].config).folder, spec, record)


def targets(example: Example, scratch: Path) -> dict[str, Target]:
    """Every target by name. ``scratch`` is an empty folder, in memory if the machine has such a place."""
    return {
        **dict(_run_targets(example, scratch / "run")),
        **dict(_data_targets(example, scratch / "data")),
        **dict(_text_targets(scratch)),
        **dict(_other_targets(example, scratch)),
        **dict(_import_targets(example, scratch / "import")),
    }


def _run_targets(example: Example, folder: Path) -> Iterator[tuple[str, Target]]:
    """A file of a run, by itself and with the whole run, as comparisons and reports read it."""
    shutil.copytree(example.run, folder)
    (folder / CHECKSUMS).unlink()  # so that the damage meets the checks behind it
    run = RunFolder(folder)
    readers: dict[str, Callable[[], object]] = {
        CONFIG: run.read_config,
        DATA: run.read_data,
        ENVIRONMENT: run.read_environment,
        SUMMARY: run.read_summary,
        METRICS: run.read_rows,
        PRECISION: lambda: read_record(folder / PRECISION, PrecisionInfo),
    }
    for name, read in readers.items():
        yield name, _in_place(folder / name, read, change_json)
    for name, dimensions in ((STORY_LOSSES, 2), (POSITION_LOSSES, 1)):
        read = partial(run.read_array, name, dimensions)
        yield name, _in_place(folder / name, read)
    last = run.checkpoint("last")
    yield "checkpoint", _in_place(last, lambda: checkpoint.load(last), change_checkpoint)
    for name in (CONFIG, SUMMARY, METRICS):
        yield f"run with its {name}", _in_place(folder / name, lambda: _use(folder), change_json)


def _use(folder: Path) -> None:
    """Read a run, and what listings and reports derive from it."""
    run = load_run(folder)
    _ = run.speed, run.training_memory, run.evaluations, run.code_versions, run.quantization
    list_run(folder)


def _data_targets(example: Example, folder: Path) -> Iterator[tuple[str, Target]]:
    """A file of a data set whose manifest has the right hashes, as in one that somebody made up."""
    shutil.copytree(example.data, folder)
    (folder / CHECKSUMS).unlink()
    manifest = folder / MANIFEST
    whole = json.loads(manifest.read_bytes())

    def use() -> None:
        dataset = load_dataset(folder)
        splits = [*dataset.splits.values(), *([dataset.open_test()] if dataset.has_test else [])]
        for split in splits:
            _ = len(split), split.text_bytes
            split.windows([0, len(split) - 17], 17)
            dataset.tokenizer.decode(split.read(0, 16).tolist())

    def sealed(name: str) -> Callable[[], None]:
        def read() -> None:
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            values: dict[str, Any] = json.loads(json.dumps(whole))
            train = values["splits"]["train"]
            if name == TOKENIZER_FILE:
                values["tokenizer"]["sha256"] = digest
            elif name == train["stories_file"]:
                train["stories_sha256"] = digest
            else:
                train["shards"][0]["sha256"] = digest
            values["fingerprint"] = fingerprint(values)
            manifest.write_text(json.dumps(values), encoding="utf-8")
            use()

        return read

    yield MANIFEST, _in_place(manifest, use, change_manifest)
    train = whole["splits"]["train"]
    for name in (TOKENIZER_FILE, train["stories_file"], train["shards"][0]["file"]):
        yield f"data set's {name}", _in_place(folder / name, sealed(name))


def _text_targets(scratch: Path) -> Iterator[tuple[str, Target]]:
    """Corpora, in every form that ``prepare`` reads."""
    texts = ["Once upon a time.", "The end.\r\nIndeed \ufeffé\u2028", ""]
    plain = "<|endoftext|>".join(texts).encode()
    rows = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()
    for name, seeds in (
        ("stories.txt", [plain, b"", b"one\n\n---\n\ntwo"]),
        ("stories.jsonl", [rows, b'"text"\nnull\n{"story": "a"}\r{"text": "b"}']),
        ("stories.txt.gz", [_compressed(plain, "gzip")]),
        ("stories.jsonl.zst", [_compressed(rows, "zstd")]),
        ("stories.parquet", list(_parquet(texts))),
    ):
        path = scratch / name
        path.write_bytes(seeds[0])
        target = _in_place(path, lambda path=path: list(clean(read_texts(path, Tally()), Tally())))  # type: ignore[misc]
        yield name, replace(target, seeds=seeds)


def _other_targets(example: Example, scratch: Path) -> Iterator[tuple[str, Target]]:
    spec = scratch / "rates.toml"
    shutil.copy(example.spec, spec)
    toml = _in_place(spec, lambda: load_experiment(spec), change_toml)
    yield "experiment file", replace(toml, seeds=[*toml.seeds, FACTORS.encode()])
    record = scratch / "rates.json"
    shutil.copy(example.record, record)
    yield "experiment record", _in_place(record, lambda: read_experiment(record), change_json)
    sums = scratch / CHECKSUMS
    shutil.copy(example.run / CHECKSUMS, sums)
    yield CHECKSUMS, _in_place(sums, lambda: read_checksums(scratch))
    made = scratch / RECORD
    values = {name: "x" for name in ("weights", "model_class", "storylab", "run", "checkpoint")}
    values |= {"format": "hf", "weights_sha256": "0" * 64, "data_fingerprint": "0" * 64}
    lists = {"prompts": ["a"], "findings": ["b"], "files": {"model.safetensors": "0" * 64}}
    made.write_text(json.dumps(values | lists), encoding="utf-8")
    yield "export record", _in_place(made, lambda: read_export(scratch), change_json)
    tokenizer = scratch / TOKENIZER_FILE
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    tokenizer.write_text("".join(lines) + "aGU= 256\n", encoding="ascii")
    yield "tokenizer", _in_place(tokenizer, lambda: _encode(tokenizer))
    flags = b"--preset nano --attention window:4*3,full --dtype fp8 --recipe *.*.scaling=tiles --no-compile"
    yield "flags", Target([flags], _parse_flags)


def _import_targets(example: Example, scratch: Path) -> Iterator[tuple[str, Target]]:
    """A file of a model that another program trained, with the others whole."""
    for name, path, read, change in import_targets(example.data, scratch):
        yield name, _in_place(path, read, change)


def _encode(path: Path) -> None:
    tokenizer = load_tokenizer(path, "bpe")
    tokenizer.decode(tokenizer.encode("the hen \u00e9"))


def _parse_flags(data: bytes) -> None:
    words = [word for word in data.decode("utf-8", "replace").split() if not word.startswith("-h")]
    if "--help" not in words:
        parse(TrainConfig, words, "storylab train")


def _in_place(path: Path, read: Callable[[], object], change: Change | None = None) -> Target:
    """A target whose bytes replace the file ``path``, which is whole now."""
    whole = path.read_bytes()

    def put(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read()
        finally:
            path.write_bytes(whole)

    return Target([whole], put, change)


def _compressed(data: bytes, how: str) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, how) as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def _parquet(texts: Sequence[str]) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for column, compression in (
        (pa.array(texts), "snappy"),
        (pa.array(texts).dictionary_encode(), "none"),
    ):
        sink = io.BytesIO()
        table = pa.table({"text": column, "id": list(range(len(texts)))})
        pq.write_table(table, sink, compression=compression, write_page_checksum=False)
        yield sink.getvalue()
