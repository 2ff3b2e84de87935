"""Train next to other programs on the same cores.

Threads of GNU's OpenMP library, which torch's CPU builds use, spin for milliseconds wherever they wait for
each other. If every thread has a core for itself, that saves waking up. If another program holds
the core of the thread that is waited for, a step takes many times as long (docs/performance.md has
the table). So a run on a CPU watches the use of the cores. If other programs leave no core free, it
tries three ways and takes the fastest: to go on, to wait without spinning, or to use one thread.
None of it changes a bit: waiting is no arithmetic, and one thread is used only after a whole step
has given the same bits with it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import psutil
import torch
from torch import Tensor

from storylab.record import checkpoint
from storylab.training.state import TrainState
from storylab.training.step import NonFiniteError

# Other programs count from this many cores on, and the machine is busy where fewer than this are idle.
SOME_CORES = 0.25
# A way of working is timed for this long at least.
WINDOW_SECONDS = 1.0
# Duration of one measurement of the cores' use, in seconds.
LOOK_SECONDS = 0.1
# Seconds until another trial, on a machine that stays busy.
TRIAL_SECONDS = 60.0
# Elements of an operation that torch shares between threads, whatever it asks for at least.
SHARED_ELEMENTS = 2**20

SPINNING, SLEEPING, ONE_THREAD = "spinning", "sleeping", "one thread"


class CoreUse:
    """How many cores other programs have used since :meth:`restart`, and how many were idle."""

    def __init__(self) -> None:
        self.others = self.idle = 0.0
        self._process = psutil.Process()
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._all, self._own, self._at = _busy_and_idle(), self._own_seconds(), time.perf_counter()

    def read(self) -> CoreUse:
        """Bring the numbers up to date."""
        busy, idle = _busy_and_idle()
        seconds = max(time.perf_counter() - self._at, 1e-6)
        own = self._own_seconds() - self._own
        # The kernel counts in hundredths of a second, so small differences may come out below zero.
        self.others = max(busy - self._all[0] - own, 0.0) / seconds
        self.idle = max(idle - self._all[1], 0.0) / seconds
        return self

    @property
    def crowded(self) -> bool:
        """Whether other programs leave this one without a free core."""
        return self.others >= SOME_CORES and self.idle < SOME_CORES

    def _own_seconds(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def _busy_and_idle() -> tuple[float, float]:
    """Seconds that all cores have worked, for other guests of the same host too, and idled."""
    times = psutil.cpu_times()._asdict()
    idle = times["idle"] + times.get("iowait", 0.0)
    # Time of virtual machines is within user and nice.
    double = times.get("guest", 0.0) + times.get("guest_nice", 0.0)
    return sum(times.values()) - idle - double, idle


class SleepingWaits:
    """While entered, torch's threads give their cores away as soon as they wait.

    GNU's OpenMP library spins 300,000 times before it lets a thread sleep, but hardly at all once its
    threads outnumber the cores. Pools of idle threads, each made by a thread of ours, bring that about.
    Other OpenMP libraries are not affected.
    """

    def __init__(self) -> None:
        self._leave = threading.Event()
        self._holders: list[threading.Thread] = []

    def __enter__(self) -> SleepingWaits:
        threads = torch.get_num_threads()
        if threads == 1:
            return self  # which wait for nobody
        pools = available_cores() // (threads - 1) + 1
        ready = threading.Barrier(pools + 1)

        def hold() -> None:
            torch.zeros(SHARED_ELEMENTS).add_(1.0)  # makes this thread's pool
            ready.wait()
            self._leave.wait()

        self._holders = [threading.Thread(target=hold, daemon=True) for _ in range(pools)]
        for holder in self._holders:
            holder.start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        for holder in self._holders:
            holder.join()
        self._leave.clear()


def available_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def considerate(device: torch.device) -> AbstractContextManager[object]:
    """Context for work on a CPU that is too short to try several ways: threads sleep while they
    wait if other programs leave no core free at its start."""
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return nullcontext()
    use = CoreUse()
    time.sleep(LOOK_SECONDS)
    return SleepingWaits() if use.read().crowded else nullcontext()


class CoreSharing:
    """Chooses the fastest way for threads to wait while the machine is busy.

    Call :meth:`begin` before a step, :meth:`tick` before each of its micro-batches, and :meth:`end`.

    Args:
        active: False makes every call do nothing, for other devices than the CPU.
        one_thread: whether a step gives the same bits with one thread; asked once at most, between steps.
        tell: called with one line when the way of waiting first changes.
    """

    def __init__(
        self,
        active: bool,
        one_thread: Callable[[], bool] = lambda: False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.threads = torch.get_num_threads()
        self.active = active and self.threads > 1
        self.way = SPINNING
        self._one_thread, self._tell, self._told = one_thread, tell, False
        self._proven: bool | None = None
        self._prove = False
        self._sleeping = SleepingWaits()
        self._use = CoreUse()
        self._others_seconds = self._watched_seconds = 0.0
        self._in_micro_batch = False
        self._last = self._seconds = 0.0
        self._micro_batches = 0
        self._untried: list[str] = []
        self._rates: dict[str, float] = {}
        self._next_trial = 0.0

    @property
    def other_cores(self) -> float | None:
        """Cores that other programs used on average; None where nothing was watched."""
        return self._others_seconds / self._watched_seconds if self._watched_seconds else None

    def begin(self) -> None:
        """A step begins."""
        if not self.active:
            return
        if self._prove:
            self._prove, self._proven = False, self._one_thread()
            self._untried += [ONE_THREAD] if self._proven else []
        self._in_micro_batch, self._last = False, time.perf_counter()

    def tick(self) -> None:
        """A micro-batch begins, and the one before it is done."""
        self._count()
        self._in_micro_batch = True

    def end(self) -> None:
        """The step is done."""
        self._count()
        self._in_micro_batch = False

    @contextmanager
    def all_threads(self) -> Iterator[None]:
        """Context for work other than steps, which has not been shown to give the same bits with
        one thread."""
        alone = self.way == ONE_THREAD
        if alone:
            self._go(SLEEPING)
        try:
            yield
        finally:
            if alone:
                self._go(ONE_THREAD)

    def close(self) -> None:
        """Let threads wait as they did at the start."""
        self._go(SPINNING)

    def _count(self) -> None:
        if not self.active:
            return
        now = time.perf_counter()
        self._seconds += now - self._last
        self._last = now
        self._micro_batches += self._in_micro_batch
        if self._seconds >= WINDOW_SECONDS and self._micro_batches:
            use = self._use.read()
            self._others_seconds += use.others * self._seconds
            self._watched_seconds += self._seconds
            self._decide(use, self._micro_batches / self._seconds)
            self._seconds, self._micro_batches = 0.0, 0
            self._use.restart()

    def _decide(self, use: CoreUse, rate: float) -> None:
        """Go on, try another way, or take the best, after a window at ``rate`` micro-batches a second."""
        if self._rates:  # a trial is under way
            self._rates[self.way] = rate
            if self._untried:
                self._go(self._untried.pop())
                return
            # Not for a difference that the next second may turn round.
            self._rates[SPINNING] *= 1.05
            self._go(max(self._rates, key=lambda way: self._rates[way]))
            self._rates = {}
            self._next_trial = time.perf_counter() + TRIAL_SECONDS
            if self.way != SPINNING and not self._told:
                self._told = True
                self._tell(
                    f"Other programs use {use.others:.1f} of {available_cores()} cores: threads wait "
                    "without spinning while they do, and speeds are lower than alone"
                )
        elif use.crowded and time.perf_counter() >= self._next_trial:
            self._prove = self._proven is None  # where the next step begins
            ways = [SPINNING, SLEEPING, *([ONE_THREAD] if self._proven else [])]
            self._rates = {self.way: rate}
            self._untried = [way for way in ways if way != self.way]
            self._go(self._untried.pop())
        elif self.way != SPINNING and use.others < SOME_CORES:
            self._go(SPINNING)
            self._next_trial = 0.0

    def _go(self, way: str) -> None:
        if way == self.way:
            return
        if self.way == SLEEPING:
            self._sleeping.__exit__()
        elif self.way == ONE_THREAD:
            torch.set_num_threads(self.threads)
        if way == SLEEPING:
            self._sleeping.__enter__()
        elif way == ONE_THREAD:
            torch.set_num_threads(1)
        self.way = way


def same_bits_with_one_thread(
    state: TrainState, iteration: int, windows: Tensor, learning_rate: float
) -> bool:
    """Whether a whole step over ``windows [S, T + 1]`` gives the same bits with one thread as with all.

    Sums that are split between threads differ. The state is afterwards as it was before. False
    where memory does not suffice to find out.
    """
    threads = torch.get_num_threads()
    tensors = state.tensors()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if psutil.virtual_memory().available < 3 * size:
        return False
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    scaler = state.scaler.state_dict()
    results = []
    for count in (threads, 1):
        torch.set_num_threads(count)
        try:
            found = state.step(iteration, windows, learning_rate).read()
        except NonFiniteError:
            return False
        finally:
            torch.set_num_threads(threads)
            digest = checkpoint.weights_sha256(state.tensors())
            for optimizer in state.optimizers:
                optimizer.state.clear()
            state.restore({name: tensor.clone() for name, tensor in kept.items()})
            state.model.zero_grad(set_to_none=True)
            if scaler:
                state.scaler.load_state_dict(scaler)
        results.append((found, digest))
    return results[0] == results[1]
