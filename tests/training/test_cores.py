"""Training while other programs run: the fastest way to wait is found, and no way changes a bit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch

from storylab.config import TrainConfig
from storylab.record import checkpoint
from storylab.record.schema import IterationRow
from storylab.training import cores
from storylab.training.cores import (
    ONE_THREAD,
    SLEEPING,
    SPINNING,
    CoreSharing,
    CoreUse,
    SleepingWaits,
    same_bits_with_one_thread,
)
from storylab.training.setup import resolve_device
from storylab.training.state import TrainState
from storylab.training.train import train

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Clock:
    """A machine on which a step takes as long as the way of waiting says, in its own seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
        self.now, self.seconds, self.others = 0.0, seconds, 0.0
        monkeypatch.setattr(cores.time, "perf_counter", lambda: self.now)
        clock = self

        class Use(CoreUse):
            def restart(self) -> None: ...

            def read(self) -> CoreUse:
                self.others, self.idle = clock.others, max(0.0, 0.5 - clock.others)
                return self

        monkeypatch.setattr(cores, "CoreUse", Use)

    def train(self, sharing: CoreSharing, seconds: float) -> list[str]:
        """Steps of two micro-batches for so long; the way that each step was trained in."""
        end, ways = self.now + seconds, []
        while self.now < end:
            sharing.begin()
            for _ in range(2):
                sharing.tick()
                self.now += self.seconds[sharing.way] / 2
            ways.append(sharing.way)
            sharing.end()
            self.now += 7.0  # an evaluation, which no way of waiting is to blame for
        return ways


WAYS = {SPINNING: 3.0, SLEEPING: 0.4, ONE_THREAD: 0.5}


@pytest.mark.parametrize(
    ("seconds", "proven", "expected"),
    [
        (WAYS, True, SLEEPING),
        (WAYS | {ONE_THREAD: 0.3}, True, ONE_THREAD),
        (WAYS | {ONE_THREAD: 0.3}, False, SLEEPING),  # it would change bits
        (WAYS | {SPINNING: 0.3}, True, SPINNING),  # what is low in priority disturbs little
    ],
)
def test_the_fastest_way_is_taken_while_the_machine_is_busy(
    monkeypatch: pytest.MonkeyPatch,
    two_threads: None,
    seconds: dict[str, float],
    proven: bool,
    expected: str,
) -> None:
    clock = Clock(monkeypatch, seconds)
    lines: list[str] = []
    sharing = CoreSharing(True, lambda: proven, lines.append)
    assert set(clock.train(sharing, 200)) == {SPINNING}  # nothing is tried on a quiet machine
    clock.others = 1.0
    clock.train(sharing, 300)
    ways = clock.train(sharing, 2000)
    assert ways.count(expected) / len(ways) > 0.6
    assert torch.get_num_threads() == (1 if sharing.way == ONE_THREAD else 2)
    assert len(lines) == (expected != SPINNING)
    clock.others = 0.0
    clock.train(sharing, 100)
    assert set(clock.train(sharing, 200)) == {SPINNING}
    assert torch.get_num_threads() == 2
    assert (
        sharing.other_cores is not None and 0 < sharing.other_cores < 1
    )  # of quiet and busy times
    sharing.close()


def test_on_one_thread_there_is_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, WAYS)
    clock.others = 2.0
    sharing = CoreSharing(True, lambda: pytest.fail("asked"))
    assert set(clock.train(sharing, 100)) == {SPINNING}
    assert sharing.other_cores is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16", "optimizer": "normuon", "ema_fraction": 0.5},
        {"dtype": "float16"},
        {"dtype": "nvfp4", "block_size": 32},
        {"dtype": "fp8", "block_size": 32},
    ],
)
def test_a_run_that_tries_all_ways_has_the_bits_of_one_that_tries_none(
    tiny_config: MakeConfig,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    two_threads: None,
    changes: dict[str, Any],
) -> None:
    plain = train(tiny_config(out_dir=tmp_path / "plain", max_iters=12, **changes))
    # Every way is tried within a few iterations; a machine with other load would need minutes.
    monkeypatch.setattr(cores, "WINDOW_SECONDS", 0.0)
    monkeypatch.setattr(cores, "TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(CoreUse, "crowded", True)
    seen: set[str] = set()
    # Every tick counts as after a micro-batch, so that a way changes within a step, too; no public call
    # does this.
    monkeypatch.setattr(
        CoreSharing, "tick", lambda self: (seen.add(self.way), CoreSharing._count(self))[0]
    )
    begin = CoreSharing.begin

    def with_work(self: CoreSharing) -> None:
        begin(self)
        self._in_micro_batch = True

    monkeypatch.setattr(CoreSharing, "begin", with_work)
    run = train(tiny_config(out_dir=tmp_path / "busy", max_iters=12, **changes))
    assert {SPINNING, SLEEPING, ONE_THREAD} <= seen
    hashes = [checkpoint.load(r.checkpoint("last"))[0] for r in (plain, run)]
    assert hashes[0].keys() == hashes[1].keys()
    assert all(torch.equal(hashes[0][name], hashes[1][name]) for name in hashes[0])
    losses = [
        [row.loss for row in r.read_rows() if isinstance(row, IterationRow)] for r in (plain, run)
    ]
    assert losses[0] == losses[1]
    assert torch.get_num_threads() == 2


def test_a_sum_that_is_cut_up_between_threads_is_noticed(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    config, precision = resolve_device(tiny_config())
    learner = TrainState(config, 300, precision)
    windows = torch.randint(300, (4, 17), generator=torch.Generator().manual_seed(0))
    assert same_bits_with_one_thread(learner, 0, windows, 1e-3)
    step = TrainState.step

    def by_threads(self: TrainState, *args: Any, **options: Any) -> Any:
        result = step(self, *args, **options)
        with torch.no_grad():
            self.model.norm.weight[0] += torch.get_num_threads() * 1e-6
        return result

    # A sum whose bits depend on the number of threads, as a faulty kernel would give.
    monkeypatch.setattr(TrainState, "step", by_threads)
    before = [p.detach().clone() for p in learner.model.parameters()]
    assert not same_bits_with_one_thread(learner, 0, windows, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True))
    assert not any(optimizer.state for optimizer in learner.optimizers)


@pytest.mark.slow
def test_what_others_use_is_what_the_kernel_counts() -> None:
    """Against a process that is known to use a core, by the kernel's own count of its time."""
    use = CoreUse()
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        other = psutil.Process(burner.pid)
        start, before = time.perf_counter(), sum(other.cpu_times()[:2])
        use.restart()
        while (took := time.perf_counter() - start) < 1.0:
            pass  # so does this one, which does not count
        used = (sum(other.cpu_times()[:2]) - before) / took
        assert use.read().others > used - 0.1
        assert 0 <= use.idle <= (os.cpu_count() or 1)
    finally:
        burner.kill()
        burner.wait()


def test_waits_without_spinning_come_and_go(two_threads: None) -> None:
    """Threads are made for it and end with it, again and again."""
    process = psutil.Process()
    torch.zeros(2**21).add_(1.0)
    before = process.num_threads()
    waits = SleepingWaits()
    for _ in range(3):
        with waits:
            assert process.num_threads() > before
            assert torch.ones(2**21).sum() == 2**21
        deadline = time.monotonic() + 10
        while process.num_threads() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.num_threads() <= before


def test_an_evaluation_uses_all_threads(two_threads: None) -> None:
    sharing = CoreSharing(True)
    for way, threads in ((SPINNING, 2), (SLEEPING, 2), (ONE_THREAD, 1)):
        # begin() would measure the machine before it chooses.
        sharing._go(way)
        assert torch.get_num_threads() == threads
        with sharing.all_threads():
            assert torch.get_num_threads() == 2 and sharing.way != ONE_THREAD
        assert sharing.way == way and torch.get_num_threads() == threads
    sharing.close()


@pytest.mark.parametrize("crowded", [True, False])
def test_short_work_is_considerate(
    monkeypatch: pytest.MonkeyPatch, two_threads: None, crowded: bool
) -> None:
    # Whether other programs are at work is the machine's to say.
    monkeypatch.setattr(CoreUse, "crowded", crowded)
    assert isinstance(cores.considerate(torch.device("cpu")), SleepingWaits) == crowded
    assert not isinstance(cores.considerate(torch.device("cuda")), SleepingWaits)
