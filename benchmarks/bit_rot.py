"""Bit rot: change bytes of the files of a run and its data set, one at a time, and use the file.

    python benchmarks/bit_rot.py [--every 1]

A small run is trained and read by the code behind `eval`, `sample`, `compare`, `report`, `export` and
`resume`. Every file is changed at every ``--every``-th byte, to another value each. A change that no error
names is printed; the exit code is 1 if there is one. `verify` has such a test in ``tests/verify``.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fuzz_targets import Example, make_example
from storylab.checksums import CHECKSUMS, read_checksums
from storylab.data.dataset import TOKENIZER_FILE, load_dataset
from storylab.errors import UserError
from storylab.record import checkpoint
from storylab.record.folder import LOG, open_run
from storylab.record.run import load_run

Use = Callable[[], object]


def uses(example: Example) -> Iterator[tuple[Path, Use]]:
    """Every file of a run and of its data set, except the log, with the code that reads it for its use."""
    run, data = example.run, example.data
    for name in (*read_checksums(run).sums, CHECKSUMS):
        path = run / name
        if name == TOKENIZER_FILE:
            yield path, lambda: open_run(run).load_tokenizer()
        elif path.suffix == ".safetensors":
            yield path, lambda path=path: checkpoint.load(path)  # type: ignore[misc]
        elif name != LOG:
            yield path, lambda: load_run(run)
    for name in (*read_checksums(data).sums, CHECKSUMS):
        yield data / name, lambda: load_dataset(data).open_test()


def unnoticed(path: Path, use: Use, places: Iterable[int], draw: random.Random) -> Iterator[int]:
    """Change a file at each of ``places`` in turn; yields those at which using it named no fault of it."""
    whole = path.read_bytes()
    try:
        for place in places:
            value = whole[place] ^ draw.randrange(1, 256)
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                use()
            except UserError as error:
                if path.name in str(error):
                    continue
            yield place
    finally:
        path.write_bytes(whole)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, help="bytes from one change to the next")
    args = parser.parse_args()
    tried = failed = 0
    with tempfile.TemporaryDirectory() as place:
        for path, use in uses(make_example(Path(place))):
            places = range(0, path.stat().st_size, args.every)
            missed = list(unnoticed(path, use, places, random.Random(path.name)))
            tried, failed = tried + len(places), failed + len(missed)
            print(
                f"{path.relative_to(place)}: {len(places):,} bytes, unnoticed: {missed or 'none'}",
                flush=True,
            )
    print(f"{tried:,} changed bytes, {failed:,} unnoticed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
