"""Faults of the machine: each leaves one clear line or nothing, and the next command has the same result.

``soak.py`` does many more kills than these.
"""

from __future__ import annotations

import contextlib
import errno
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import Fault, ForkServer
from scenarios import EVALUATE, TRAIN, Scenario, make_scenarios
from soak import SIGKILLED, Reference, reference

from storylab.locks import exclusive

pytestmark = [pytest.mark.slow, pytest.mark.posix]
if not Path("/proc/self/fd").is_dir():
    pytest.skip("the harness reads /proc", allow_module_level=True)


class Bench:
    """The scenarios, a process to run them, and the results of commands that nothing has disturbed."""

    def __init__(self, server: ForkServer, root: Path) -> None:
        self.server, self.root = server, root
        self.scenarios = make_scenarios(server, root)
        self._known: dict[str, Reference] = {}

    def known(self, phase: str) -> Reference:
        if phase not in self._known:
            place = self.root / "reference"
            self._known[phase] = reference(self.server, self.scenarios[phase], place)
        return self._known[phase]

    def begin(self, phase: str, place: Path) -> tuple[Scenario, Path]:
        scenario = self.scenarios[phase]
        return scenario, scenario.begin(place)

    def require_same(self, phase: str, place: Path) -> None:
        """The next command succeeds, and has the result of one that nothing has disturbed."""
        assert self.scenarios[phase].finish(self.server, place) == self.known(phase).result


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with ForkServer() as server:
        yield Bench(server, tmp_path_factory.mktemp("faults"))


def one_line(output: str, *words: str) -> bool:
    """Whether the last line is storylab's, has all ``words``, and no traceback is above it."""
    last = output.strip().splitlines()[-1]
    found = last.startswith("storylab: ") and all(word in last for word in words)
    return found and "Traceback" not in output


KILLS = {
    "preparation": 3,
    "training": 2,
    "checkpointing": 2,
    "evaluation": 2,
    "scheduling": 1,
    "reporting": 1,
    "export": 2,
}


@pytest.mark.parametrize("phase", KILLS)
def test_a_kill_in_the_middle_of_a_write_is_forgotten(
    bench: Bench, tmp_path: Path, phase: str
) -> None:
    draw, points = random.Random(phase), bench.scenarios[phase].points(bench.known(phase).ended)
    for point in draw.sample(points, KILLS[phase]):
        scenario, place = bench.begin(phase, tmp_path / "work")
        assert scenario.run(bench.server, place, Fault(kill_at=point)).code == SIGKILLED
        bench.require_same(phase, place)


@pytest.mark.parametrize("phase", ["preparation", "training", "export"])
def test_a_power_cut_loses_nothing_that_was_said_to_be_saved(
    bench: Bench, tmp_path: Path, phase: str
) -> None:
    draw, points = random.Random(phase), bench.scenarios[phase].points(bench.known(phase).ended)
    for seed, point in enumerate(draw.sample(points, 2)):
        scenario, place = bench.begin(phase, tmp_path / "work")
        fault = Fault(power_cut=point, seed=seed)
        assert scenario.run(bench.server, place, fault).code == SIGKILLED
        bench.require_same(phase, place)


def test_a_power_cut_that_loses_every_unsynced_name_loses_no_checkpoint(
    bench: Bench, tmp_path: Path
) -> None:
    """A checkpoint is on the disk before the folder of the rows is synced by anything else."""
    changes = bench.known("training").ended.changes
    second = [
        n for n, change in enumerate(changes, start=1) if "rename run/checkpoints/last" in change
    ][1]
    for seed in range(3):
        scenario, place = bench.begin("training", tmp_path / "work")
        fault = Fault(power_cut=second + 2, seed=seed, loses_all=True)
        assert scenario.run(bench.server, place, fault).code == SIGKILLED
        bench.require_same("training", place)


@pytest.mark.parametrize("phase", ["preparation", "training", "export"])
def test_a_full_disk_at_any_change_is_one_line(bench: Bench, tmp_path: Path, phase: str) -> None:
    """From one change on, nothing more can be written, in a run that may have begun to train."""
    points = bench.scenarios[phase].points(bench.known(phase).ended)
    draw = random.Random(phase)
    for point in [points[0], *draw.sample(points, 2)]:
        scenario, place = bench.begin(phase, tmp_path / "work")
        ended = scenario.run(bench.server, place, Fault(fail_from=point, error=errno.ENOSPC))
        assert ended.code == 2 and one_line(ended.output, "No space left"), ended.output
    bench.require_same(phase, place)


@contextlib.contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[None]:
    """A file system of its own at ``place``; skips where this user may not mount one."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kilobytes", [200, 400])
def test_a_disk_that_is_really_full_loses_nothing(
    bench: Bench, tmp_path: Path, kilobytes: int
) -> None:
    place = tmp_path / "disk"
    with small_disk(place, kilobytes):
        shutil.copytree(bench.scenarios["training"].start, place, dirs_exist_ok=True)
        ended = bench.scenarios["training"].run(bench.server, place)
        assert ended.code == 2 and one_line(ended.output, "No space left"), ended.output
        subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True)
        bench.require_same("training", place)


def test_a_read_only_disk_is_one_line_and_still_read(bench: Bench, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    with small_disk(place, 100_000):
        shutil.copytree(bench.scenarios["export"].start, place, dirs_exist_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        for words in ([*TRAIN[:-1], "other"], ["prepare", "--source", "builtin", "--out", "d"]):
            ended = bench.server.run(place, words)
            assert ended.code == 2 and one_line(ended.output, "Read-only"), ended.output
        for words in (EVALUATE, ["info", "run"], ["list", "--runs", "."]):
            ended = bench.server.run(place, words)
            assert ended.code == 0, ended.output


def test_a_slow_disk_changes_no_bit(bench: Bench, tmp_path: Path) -> None:
    scenario, place = bench.begin("training", tmp_path / "work")
    assert scenario.run(bench.server, place, Fault(delay=0.005)).code == 0
    assert scenario.result(place) == bench.known("training").result


def test_a_run_folder_that_is_removed_is_one_line(bench: Bench, tmp_path: Path) -> None:
    changes = bench.known("training").ended.changes
    rows = [n for n, change in enumerate(changes, start=1) if change == "write run/metrics.jsonl"]
    for point in (rows[2] - 1, rows[-1]):
        scenario, place = bench.begin("training", tmp_path / "work")
        fault = Fault(remove_at=point, remove=str(place / "run"))
        ended = scenario.run(bench.server, place, fault)
        assert ended.code == 2 and one_line(ended.output, "run", "No such file"), ended.output
        bench.require_same("training", place)


def test_a_clock_that_is_set_back_changes_no_bit(bench: Bench, tmp_path: Path) -> None:
    scenario, place = bench.begin("training", tmp_path / "work")
    assert scenario.run(bench.server, place, Fault(clock_back_at=100)).code == 0
    assert scenario.result(place) == bench.known("training").result
    assert bench.server.run(place, ["verify", "run"]).code == 0


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"RLIMIT_NOFILE": 8}, ("open files",)),
        ({"RLIMIT_AS": 1}, ("memory",)),
        ({"RLIMIT_FSIZE": 5_000}, ("cannot write", "File too large")),
    ],
    ids=str,
)
def test_a_limit_of_the_system_is_one_line(
    bench: Bench, tmp_path: Path, limits: dict[str, int], words: tuple[str, ...]
) -> None:
    scenario, place = bench.begin("training", tmp_path / "work")
    ended = scenario.run(bench.server, place, Fault(limits=limits))
    assert ended.code == 2 and one_line(ended.output, *words), ended.output
    bench.require_same("training", place)


def test_two_processes_do_not_train_one_run(bench: Bench, tmp_path: Path) -> None:
    scenario, place = bench.begin("training", tmp_path / "work")
    point = bench.known("training").ended.changes.index("write run/metrics.jsonl") + 2
    assert scenario.run(bench.server, place, Fault(kill_at=point)).code == SIGKILLED
    with exclusive(place / "run"):
        ended = scenario.run(bench.server, place)
        assert ended.code == 2 and one_line(ended.output, "another process")
    bench.require_same("training", place)


@pytest.mark.parametrize("phase", ["training", "scheduling"])
def test_sigterm_saves_and_its_exit_code_asks_to_be_queued_again(
    bench: Bench, tmp_path: Path, phase: str
) -> None:
    """143: the same command, or resume, goes on."""
    changes = bench.known(phase).ended.changes
    points = [n for n, change in enumerate(changes, start=1) if change.endswith("metrics.jsonl")]
    for point in random.Random(phase).sample(points, 2 if phase == "training" else 1):
        scenario, place = bench.begin(phase, tmp_path / "work")
        ended = scenario.run(bench.server, place, Fault(term_at=point))
        assert ended.code == 128 + signal.SIGTERM, ended.output
        bench.require_same(phase, place)
