"""The files that storylab reads, each with the code that reads it: targets for fuzzing.

A target takes the bytes of a file, puts them where a whole file was, and reads it as a command would. It may
raise a :class:`storylab.errors.UserError`; anything else is a finding. To fuzz another file, add an entry to
:func:`targets`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from storylab.checksums import CHECKSUMS, read_checksums
from storylab.config import TrainConfig
from storylab.data.dataset import MANIFEST, TOKENIZER_FILE, fingerprint, load_dataset
from storylab.data.prepare import PrepareConfig, prepare
from storylab.data.reading import clean, read_texts
from storylab.data.tally import Tally
from storylab.data.tokenizer import load_tokenizer
from storylab.experiments.experiment import Experiment
from storylab.experiments.plan import plan_runs
from storylab.experiments.records import read_experiment
from storylab.experiments.recording import write_record
from storylab.experiments.spec import load_experiment
from storylab.export.folder import RECORD, read_export
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
)
from storylab.record.index import list_run
from storylab.record.run import load_run

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
# What a value may be replaced with.
ODD_VALUES: Sequence[Any] = (
    *(None, True, False, "", "text", "1", "..", "../..", "/etc/passwd", "a/b", "\x1b[2J", "\0", "<b>|`*"),
    *(-1, 0, 1, 2, 1.5, -0.0, 10**30, -(2**63), 1e39, 5e-324, [], [1], [[]], {}, {"a": 1}, "\ud800"),
)
MOST = 1 << 14  # bytes of an input, unless the whole file is longer


@dataclass(frozen=True)
class Example:
    """A data set, a finished run on it, and an experiment's file and record, all whole."""

    data: Path
    run: Path
    spec: Path
    record: Path


Mutate = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """A kind of file: whole ones to begin with, its reader, and a change that leaves its form."""

    seeds: Sequence[bytes]
    read: Callable[[bytes], object]
    mutate: Mutate | None = None


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
    }


def _run_targets(example: Example, folder: Path) -> Iterator[tuple[str, Target]]:
    """A file of a run, read with the whole run, as comparisons and reports read it."""
    shutil.copytree(example.run, folder)
    (folder / CHECKSUMS).unlink()  # so that the damage meets the checks behind it

    def use() -> None:
        run = load_run(folder)
        _ = run.speed, run.training_memory, run.evaluations, run.code_versions, run.quantization
        list_run(folder)

    json_files = (CONFIG, DATA, ENVIRONMENT, SUMMARY, PRECISION, METRICS)
    for name in json_files:
        yield name, _in_place(folder / name, use, change_json)
    for name in (STORY_LOSSES, POSITION_LOSSES):
        yield name, _in_place(folder / name, use)
    last = folder / "checkpoints" / "last.safetensors"
    yield "checkpoint", _in_place(last, lambda: checkpoint.load(last), change_checkpoint)


def _data_targets(example: Example, folder: Path) -> Iterator[tuple[str, Target]]:
    """A file of a data set whose manifest has the right hashes, as somebody who makes one up would see to."""
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


def _encode(path: Path) -> None:
    tokenizer = load_tokenizer(path, "bpe")
    tokenizer.decode(tokenizer.encode("the hen \u00e9"))


def _parse_flags(data: bytes) -> None:
    words = [word for word in data.decode("utf-8", "replace").split() if not word.startswith("-h")]
    if "--help" not in words:
        parse(TrainConfig, words, "storylab train")


def _in_place(path: Path, read: Callable[[], object], mutate: Mutate | None = None) -> Target:
    """A target whose bytes replace the file ``path``, which is whole now."""
    whole = path.read_bytes()

    def put(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read()
        finally:
            path.write_bytes(whole)

    return Target([whole], put, mutate)


def _compressed(data: bytes, how: str) -> bytes:
    import pyarrow as pa

    sink = io.BytesIO()
    with pa.CompressedOutputStream(sink, how) as stream:
        stream.write(data)
        stream.flush()
        return sink.getvalue()


def _parquet(texts: Sequence[str]) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for column, compression in ((pa.array(texts), "snappy"), (pa.array(texts).dictionary_encode(), "none")):
        sink = io.BytesIO()
        table = pa.table({"text": column, "id": list(range(len(texts)))})
        pq.write_table(table, sink, compression=compression, write_page_checksum=False)
        yield sink.getvalue()


def change_bytes(data: bytes, draw: random.Random) -> bytes:
    """Change, add, remove or repeat a few bytes."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed) + 1)
        length = min(draw.choice((1, 1, 1, 2, 4, 8, 100)), len(changed) - at)
        match draw.randrange(5):
            case 0 | 1 if at < len(changed):
                changed[at] = draw.choice((draw.randrange(256), changed[at] ^ 1 << draw.randrange(8), 0, 255))
            case 2:
                changed[at:at] = draw.randbytes(draw.choice((1, 2, 8)))
            case 3:
                del changed[at : at + length]
            case _:
                changed[at:at] = changed[at : at + length] * draw.choice((1, 1, 3))
    return bytes(changed)


def change_json(data: bytes, draw: random.Random) -> bytes:
    """Replace, remove or move a value of a JSON file, or of one of its lines."""
    lines = data.splitlines() if b"\n{" in data else [data]
    number = draw.randrange(len(lines) or 1)
    try:
        value = json.loads(lines[number])
    except (ValueError, IndexError, RecursionError):
        return change_bytes(data, draw)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        value = changed_value(value, draw)
    lines[number] = json.dumps(value, ensure_ascii=draw.random() < 0.9).encode("utf-8", "replace")
    if len(lines) > 1 and draw.random() < 0.1:
        lines.insert(draw.randrange(len(lines)), lines[number])
    return b"\n".join(lines)


def changed_value(value: Any, draw: random.Random) -> Any:
    """``value`` with a part of it changed."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.05:
        if type(value) in (int, float) and draw.random() < 0.5:
            return value + draw.choice((-1, 1)) if draw.random() < 0.7 else value * 1e6
        return draw.choice(ODD_VALUES)
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    changed: Any = dict(value) if isinstance(value, dict) else list(value)
    chance = draw.random()
    if chance < 0.1:
        del changed[key]
    elif chance < 0.2 and isinstance(changed, list):
        changed.append(changed[key])
    elif chance < 0.2:
        changed[draw.choice(("", "../x", "text", "\x1b", *changed))] = changed[key]
    else:
        changed[key] = changed_value(changed[key], draw)
    return changed


def change_manifest(data: bytes, draw: random.Random) -> bytes:
    """As :func:`change_json`, with the fingerprint that belongs to the change."""
    changed = change_json(data, draw)
    try:
        values = json.loads(changed)
        values["fingerprint"] = fingerprint(values)
        return json.dumps(values).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return changed


def change_toml(data: bytes, draw: random.Random) -> bytes:
    """Change the value, the key or the place of a line of a TOML file, or any bytes."""
    lines = data.decode("utf-8", "replace").splitlines()
    if not lines or draw.random() < 0.3:
        return change_bytes(data, draw)
    at = draw.randrange(len(lines))
    key, equals, _ = lines[at].partition("=")
    values = ("nan", "-inf", "[]", "{}", "''", "1e400", "0", "-1", "10" * 200, '"a/b"', "[[1]]", "1979-05-27")
    if equals and draw.random() < 0.7:
        lines[at] = f"{key}= {draw.choice((*values, lines[draw.randrange(len(lines))].partition('=')[2]))}"
    elif draw.random() < 0.5:
        lines.insert(draw.randrange(len(lines)), lines.pop(at))
    else:
        lines.insert(at, lines[draw.randrange(len(lines))])
    return "\n".join(lines).encode()


def change_checkpoint(data: bytes, draw: random.Random) -> bytes:
    """Change a value in the header of a safetensors file, or any bytes."""
    size = int.from_bytes(data[:8], "little")
    if draw.random() < 0.3 or size > len(data) - 8:
        return change_bytes(data, draw)
    header = change_json(data[8 : 8 + size], draw)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
