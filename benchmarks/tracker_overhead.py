"""Seconds an iteration with a tracker that hangs, over those without one.

python benchmarks/tracker_overhead.py [PAIRS] [ITERATIONS]

Trains pairs of equal short runs, one with a tracker whose process sleeps for ever and one without any, in
turns. Prints the ratios of their median steps and of the CPU time of their process, which other programs
change less. Then times the one call that a run makes for a row. A small model is the worst case: its steps
are the shortest.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from storylab.config import ModelConfig, TrainConfig
from storylab.data.prepare import PrepareConfig, prepare
from storylab.record.schema import EvaluationRow, IterationRow
from storylab.tracking import TrackerEntry
from storylab.tracking.link import TrackerLink
from storylab.tracking.observer import TrackerObserver, plain_place
from storylab.tracking.run import tracked_run
from storylab.training.train import train

HANGING = TrackerEntry("hanging_tracker:Hanging")
CALLS = 50_000


def measure(config: TrainConfig, tracked: bool) -> tuple[float, float]:
    """Median seconds of an iteration, without the first ten, and CPU seconds of the run's process."""
    observers = [TrackerObserver("hanging", entry=HANGING, end_seconds=0.1)] if tracked else []
    began = time.process_time()
    run = train(config, *observers)
    used = time.process_time() - began
    rows = run.read_rows()
    steps = [row.step_seconds for row in rows if isinstance(row, IterationRow)]
    return statistics.median(steps[10:]), used


def main(pairs: int, iterations: int) -> None:
    """Print both measurements."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with tempfile.TemporaryDirectory() as place:
        data = prepare(
            PrepareConfig(
                source="builtin", tokenizer="bpe:300", out=Path(place) / "data", builtin_stories=300
            )
        )

        def config(name: str) -> TrainConfig:
            return TrainConfig(
                model=ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_hidden=128),
                data_dir=data.folder,
                out_dir=Path(place) / name,
                device="cpu",
                max_iters=iterations,
                batch_size=4,
                gradient_accumulation_steps=1,
                block_size=64,
                eval_interval=iterations,
                eval_iters=1,
            )

        measure(config("warm-up"), False)
        steps, used = [], []
        for pair in range(pairs):
            # Whichever comes first finds caches colder, so they take turns.
            order = (False, True) if pair % 2 else (True, False)
            found = {kind: measure(config(f"{pair}-{kind}"), kind) for kind in order}
            step, cpu = (found[True][i] / found[False][i] for i in (0, 1))
            steps.append(step)
            used.append(cpu)
            print(
                f"pair {pair}: {1000 * found[False][0]:.2f} ms a step, ratio {step:.3f}; CPU {cpu:.3f}",
                flush=True,
            )
        print(
            f"median of {pairs} pairs: {statistics.median(steps):.3f}, CPU {statistics.median(used):.3f}"
        )
        folder = Path(place) / "0-True"
        link = TrackerLink(HANGING.target, tracked_run(folder, plain_place(folder)))
        row = EvaluationRow(iteration=1, train_loss=1.0, val_loss=1.0, best=False)
        began = time.process_time()
        for _ in range(CALLS):
            link.put(row)
        microseconds = 1e6 * (time.process_time() - began) / CALLS
        link.kill()
        print(f"a row: {microseconds:.1f} microseconds of CPU time")


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] + ["7", "200"][len(sys.argv) - 1 :])))
