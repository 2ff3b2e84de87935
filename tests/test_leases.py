"""A lease is held by one process at a time, whoever is killed or suspended, and whatever the clocks say."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from storylab import leases
from storylab.leases import Claimant, Fence, Lease, LeaseLost, holder_of

EXPIRY = 0.6
HOLD = """
import sys, time
from pathlib import Path
from storylab.leases import Claimant
with Claimant(float(sys.argv[2]), locks=sys.argv[3] == "locks").claim(Path(sys.argv[1])) as lease:
    print("held" if lease else "taken", flush=True)
    time.sleep(600)
"""


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(leases, "_clock", clock)
    return clock


def machine(expiry: float = 1000.0) -> Claimant:
    """A process of another machine, with which there are no common locks."""
    return Claimant(expiry, locks=False)


def take(claimant: Claimant, folder: Path) -> Lease | None:
    """Claim and give no sign of life after that, as a process that was killed at once."""
    folder.mkdir(parents=True, exist_ok=True)
    return claimant._take(folder)


@contextmanager
def another(folder: Path, locks: str = "locks") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease of ``folder``."""
    command = [sys.executable, "-c", HOLD, str(folder), str(EXPIRY), locks]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_holds_it_and_frees_it_at_the_end(tmp_path: Path) -> None:
    first, second = machine(), machine()
    with first.claim(tmp_path) as lease:
        assert lease is not None
        holder = holder_of(tmp_path)
        assert holder is not None and holder.pid == os.getpid()
        with second.claim(tmp_path) as other:
            assert other is None
    assert holder_of(tmp_path) is None
    with second.claim(tmp_path) as lease:
        assert lease is not None
    assert [path.name for path in tmp_path.iterdir()] == ["2"]  # numbers are not used twice


def test_a_lease_expires_by_the_clock_of_who_waits(tmp_path: Path, clock: Clock) -> None:
    """The time on the files, and the clock of the holder, are of no account."""
    lease = take(machine(), tmp_path)
    assert lease is not None
    os.utime(lease.ticket, (0, 0))
    waiting = machine()
    for _ in range(3):
        assert take(waiting, tmp_path) is None
        clock.now += 400.0
        lease.renew()
    assert take(waiting, tmp_path) is None
    clock.now += 999.0
    assert take(waiting, tmp_path) is None
    clock.now += 1.0
    assert take(waiting, tmp_path) is not None


def test_the_expiry_is_the_longer_of_both(tmp_path: Path, clock: Clock) -> None:
    assert take(machine(expiry=1000.0), tmp_path) is not None
    hasty = machine(expiry=1.0)
    assert take(hasty, tmp_path) is None
    clock.now += 999.0
    assert take(hasty, tmp_path) is None
    clock.now += 1.0
    assert take(hasty, tmp_path) is not None


def test_who_lost_it_notices_before_it_writes(tmp_path: Path, clock: Clock) -> None:
    lease, thief = take(machine(), tmp_path), machine()
    assert lease is not None
    fence = Fence(Lease(**json.loads(json.dumps(dataclasses.asdict(lease)))))  # as a job carries it
    fence.check()
    assert take(thief, tmp_path) is None
    clock.now += 1000.0  # the holder is suspended
    taken = take(thief, tmp_path)
    assert taken is not None
    with pytest.raises(LeaseLost, match="taken over"):
        fence.check()
    lease.release()  # frees nothing of the thief's
    assert take(machine(), tmp_path) is None
    taken.renew()


def test_a_fence_renews_now_and_then(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = take(machine(expiry=60.0), tmp_path)
    assert lease is not None
    renewed = []
    monkeypatch.setattr(Lease, "renew", lambda self: renewed.append(clock.now))
    fence = Fence(lease)
    for _ in range(30):
        fence.check()
        clock.now += 1.0
    assert renewed == [1000.0, 1010.0, 1020.0]


def test_a_disk_that_is_away_for_long_ends_the_right(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: Lease) -> None:
        raise OSError(5, "Input/output error")

    lease = take(machine(expiry=60.0), tmp_path)
    assert lease is not None
    fence = Fence(lease)
    fence.check()
    monkeypatch.setattr(Lease, "renew", away)
    clock.now += 29.0
    fence.check()
    clock.now += 1.0
    with pytest.raises(LeaseLost):
        fence.check()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_holder_that_wakes_while_it_is_robbed(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A renewal between the thief's steps: never do both have the right, nor does a third."""
    lease, thief = take(machine(), tmp_path), machine()
    assert lease is not None and take(thief, tmp_path) is None
    clock.now += 1000.0
    write, lost = leases.write_ticket, []

    def renewed() -> None:
        try:
            lease.renew()
        except LeaseLost:
            lost.append(True)

    def wakes(path: Path, expiry: float) -> str:
        if moment == "before":
            renewed()
        line = write(path, expiry)
        if moment == "after":
            renewed()
        return line

    monkeypatch.setattr(leases, "write_ticket", wakes)
    assert take(thief, tmp_path) is None
    monkeypatch.undo()
    assert bool(lost) == (moment == "after")
    assert take(machine(), tmp_path) is None  # the ticket of the holder still counts


def test_of_many_that_find_it_expired_one_gets_it(tmp_path: Path, clock: Clock) -> None:
    """Threads with a claimant each are as good as processes: they share nothing but the folder."""
    for round_number in range(20):
        folder = tmp_path / str(round_number)
        assert take(machine(), folder) is not None
        thieves = [machine() for _ in range(6)]
        assert not any([take(thief, folder) for thief in thieves])
        clock.now += 1000.0
        got: list[Lease] = []
        start = threading.Barrier(len(thieves))

        def steal(
            thief: Claimant,
            folder: Path = folder,
            got: list[Lease] = got,
            start: threading.Barrier = start,
        ) -> None:
            start.wait()
            if (lease := take(thief, folder)) is not None:
                got.append(lease)

        threads = [threading.Thread(target=steal, args=(thief,)) for thief in thieves]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) <= 1
        for lease in got:
            lease.renew()


def test_what_is_no_ticket_is_left_alone(tmp_path: Path, clock: Clock) -> None:
    for name in ("0", "notes.txt", "-1", "٣"):
        (tmp_path / name).write_text("x")
    (tmp_path / "3").write_bytes(b"\xff half a ticket")
    claimant = machine()
    assert take(claimant, tmp_path) is None  # whoever wrote it may be alive
    clock.now += 1000.0
    lease = take(claimant, tmp_path)
    assert lease is not None and Path(lease.ticket).name == "4"
    assert {path.name for path in tmp_path.iterdir()} == {"0", "notes.txt", "-1", "٣", "4"}


@pytest.mark.posix
@pytest.mark.slow
def test_a_process_that_was_killed_here_is_known_to_be_dead(tmp_path: Path) -> None:
    with another(tmp_path) as process:
        with Claimant().claim(tmp_path) as lease:
            assert lease is None
        process.kill()
        process.wait()
        with Claimant().claim(tmp_path) as lease:
            assert lease is not None


@pytest.mark.posix
@pytest.mark.slow
def test_a_process_lives_as_long_as_it_renews(tmp_path: Path) -> None:
    """Without locks: it is robbed once it is suspended for longer than the expiry."""
    thief = machine(EXPIRY)
    with another(tmp_path, "alone") as process:
        until = time.monotonic() + 3 * EXPIRY
        while time.monotonic() < until:
            assert take(thief, tmp_path) is None
            time.sleep(EXPIRY / 10)
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: take(thief, tmp_path) is not None)


def test_a_claimant_in_a_thread_of_the_same_process_waits_too(tmp_path: Path) -> None:
    claimant = Claimant()
    with ExitStack() as stack:
        assert stack.enter_context(claimant.claim(tmp_path)) is not None
        assert stack.enter_context(claimant.claim(tmp_path)) is None
