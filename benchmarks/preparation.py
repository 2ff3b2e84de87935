"""Time `storylab prepare` and the usual route: datasets.map with a tokenizer, then a Python loop.

    python benchmarks/preparation.py --train stories.parquet --validation held-out.parquet

Needs the `bench` extra. Runs take turns (A B B A ...); reported are the median seconds of each route on
all cores, and their ratio. Every route must produce the same training tokens, or its time is void.
Two usual routes are timed: one with the `transformers` fast tokenizer, story by story, and one with
tiktoken in batches over several processes, as nanoGPT's prepare scripts have it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storylab.data.dataset import Dataset
from storylab.data.layout import END_OF_TEXT
from storylab.data.prepare import PrepareConfig, prepare
from storylab.data.tokenizer import Tokenizer, _gpt2_file, gpt2_tokenizer


def storylab_route(train: Path, validation: Path, out: Path) -> np.ndarray:
    """Both splits, with hashes, overlap check and verification on loading."""
    config = PrepareConfig(train=(train,), validation=(validation,), out=out)
    return train_tokens(prepare(config))


def train_tokens(data: Dataset) -> np.ndarray:
    split = data.splits["train"]
    return split.read(0, len(split))


def usual_route(
    train: Path, validation: Path, out: Path, encode: Callable[[str], list[int]]
) -> np.ndarray:
    """datasets.map on all cores, then the ids of every story appended to one file."""
    import datasets

    files = {"train": str(train), "validation": str(validation)}
    data = datasets.load_dataset("parquet", data_files=files, cache_dir=str(out / "cache"))
    end = 50256

    def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
        return {"ids": [*encode(row["text"].strip()), end]}

    out.mkdir(exist_ok=True)
    for name in files:
        mapped = data[name].map(tokenize, remove_columns=["text"], num_proc=os.cpu_count())
        with open(out / f"{name}.bin", "wb") as file:
            for row in mapped:
                file.write(np.asarray(row["ids"], dtype=np.uint16).tobytes())
    return np.fromfile(out / "train.bin", dtype=np.uint16).astype(np.int64)


def numbered_copies(path: Path, copies: int, out: Path) -> Path:
    """The stories ``copies`` times, numbered so that they differ: start-up then weighs less."""
    stories = pq.read_table(path)["text"].to_pylist()
    texts = [f"{n} {story}" if n else story for n in range(copies) for story in stories]
    pq.write_table(pa.table({"text": texts}), out)
    return out


def transformers_encoder() -> Callable[[str], list[int]]:
    from transformers import GPT2TokenizerFast

    vocab, merges = (str(_gpt2_file(name, None)) for name in ("encoder.json", "vocab.bpe"))
    tokenizer = GPT2TokenizerFast(vocab, merges)
    return lambda text: tokenizer(text)["input_ids"]  # type: ignore[no-any-return]


def tiktoken_encoder() -> Callable[[str], list[int]]:
    tokenizer: Tokenizer = gpt2_tokenizer()
    return tokenizer.encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--copies", type=int, default=1, help="numbered copies of the stories")
    args = parser.parse_args()
    import datasets

    corpus = tempfile.TemporaryDirectory()
    train = numbered_copies(args.train, args.copies, Path(corpus.name) / "train.parquet")
    datasets.disable_progress_bars()
    hf, tik = transformers_encoder(), tiktoken_encoder()
    routes: dict[str, Callable[[Path], np.ndarray]] = {
        "storylab prepare": lambda out: storylab_route(train, args.validation, out),
        "datasets.map + transformers + loop": lambda out: usual_route(
            train, args.validation, out, hf
        ),
        "datasets.map + tiktoken + loop": lambda out: usual_route(train, args.validation, out, tik),
    }
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    expected: np.ndarray | None = None
    for turn in range(args.repeats):
        for name in list(routes)[:: 1 if turn % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                ids = routes[name](Path(folder) / "out")
                seconds[name].append(time.perf_counter() - start)
            if expected is None:
                expected = ids
            assert np.array_equal(ids, expected), f"{name} made other tokens ({END_OF_TEXT}?)"
    ours = statistics.median(seconds["storylab prepare"])
    print(
        f"{len(expected) if expected is not None else 0:,} training tokens, {os.cpu_count()} cores"
    )
    for name, times in seconds.items():
        median = statistics.median(times)
        spread = f"{min(times):.2f} to {max(times):.2f}"
        print(f"{name:<36} {median:7.2f} s ({spread})  {median / ours:5.1f} x storylab's time")


if __name__ == "__main__":
    main()
