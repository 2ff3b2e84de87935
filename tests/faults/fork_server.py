"""Runs storylab's commands in forks of a process that has imported torch, and makes them fail on purpose.

A command starts in milliseconds, so that hundreds can be killed in minutes. Run as a program, this file is
the process that forks: it reads requests and writes replies, one JSON line each. A forked child leads a
group of processes of its own, which a kill ends as a whole.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

HELPERS = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parent)]
# Imported before the first fork; what is missing here is imported in every child again.
IMPORTS = """
torch._dynamo typeguard changes executors
storylab storylab.cli storylab.training.train storylab.training.resume
storylab.training.evaluation storylab.execution.training storylab.experiments.scheduler
storylab.experiments.outcome storylab.experiments.stopping storylab.reporting.report
storylab.export.folder storylab.export.hf storylab.verify storylab.data.prepare
storylab.tracking.observer storylab.planning.micro_batch rich.progress scipy.stats scipy.special
""".split()


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong while a command works. Changes to the file system count from 1.

    Attributes:
        kill_at: SIGKILL in the middle of this change.
        kill_after: SIGKILL after these seconds, wherever the command is.
        term_at: as ``kill_at``, with SIGTERM before the change; it goes on.
        fail_from: this change and all after it fail.
        error: the system's error number of failing changes.
        delay: seconds that every change takes longer.
        clock_back_at: from this change on, the clock of the day is a day behind.
        remove_at: before this change, the folder ``remove`` is deleted.
        remove: a folder.
        limits: resource limits by the name of their constant.
        power_cut: as ``kill_at``, and the disk loses things that were never synced.
        seed: decides the things that are lost.
        loses_all: every name that was not synced is lost.
    """

    kill_at: int = 0
    kill_after: float = 0.0
    term_at: int = 0
    fail_from: int = 0
    error: int = 0
    delay: float = 0.0
    clock_back_at: int = 0
    remove_at: int = 0
    remove: str = ""
    limits: dict[str, int] = field(default_factory=dict)
    power_cut: int = 0
    seed: int = 0
    loses_all: bool = False


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or minus the signal that ended it; what it printed; its
    changes to the file system, each as ``KIND PATH``; and its seconds."""

    code: int
    output: str
    changes: list[str]
    seconds: float


class ForkServer:
    """Starts the forking process, and has it run commands."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path()}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, place: Path, words: list[str], fault: Fault | None = None) -> Ended:
        """Run ``storylab WORDS`` in the folder ``place``, with a fault."""
        request = {"place": str(place), "words": words, "fault": asdict(fault or Fault())}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _python_path() -> str:
    return os.pathsep.join([*HELPERS, *filter(None, sys.path)])


def _serve() -> None:
    import importlib

    import torch

    torch.set_num_threads(1)
    for name in IMPORTS:
        importlib.import_module(name)
    _save_time()
    gc.freeze()  # so that a child need not copy the pages of what is imported
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        replies.write(json.dumps(asdict(_run(request))) + "\n")
        replies.flush()


def _save_time() -> None:
    """Shorten things that would take longer than all the rest of a small run."""
    from storylab.record.provenance import code_sha256
    from storylab.training.sampling import StoryModel

    code_sha256()  # it is kept
    sample = StoryModel.sample
    StoryModel.sample = lambda model, prompt: sample(model, prompt, max_new_tokens=8)  # type: ignore[method-assign,misc,assignment]


def _run(request: dict[str, Any]) -> Ended:
    place, fault = Path(request["place"]), Fault(**request["fault"])
    notes = place.with_name(place.name + ".notes")
    notes.mkdir(exist_ok=True)
    for name in ("output", "changes"):
        (notes / name).write_text("")
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        _work(place, notes, request["words"], fault)
    code = _wait(child, fault.kill_after)
    seconds = time.perf_counter() - started
    output = (notes / "output").read_text(errors="replace")
    return Ended(code, output, (notes / "changes").read_text().splitlines(), seconds)


def _wait(child: int, kill_after: float) -> int:
    """The exit code of ``child``, which is killed with its group after ``kill_after`` seconds, if any."""
    deadline = time.perf_counter() + kill_after
    while kill_after and time.perf_counter() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    if kill_after:
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _work(place: Path, notes: Path, words: list[str], fault: Fault) -> None:
    """The life of a child; never returns."""
    code = 70
    try:
        os.setsid()
        output = os.open(notes / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(0)
        os.open(os.devnull, os.O_RDONLY)
        os.chdir(place)
        for name, limit in fault.limits.items():
            number = getattr(resource, name)
            # One of memory is beyond the memory that the process has already.
            limit += _memory() if name == "RLIMIT_AS" else 0
            resource.setrlimit(number, (limit, resource.getrlimit(number)[1]))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python's own start does
        from changes import watch

        from executors import InProcess
        from storylab.cli import main

        watch(place, notes, fault)
        code = main(words, InProcess())
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _memory() -> int:
    """Bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    _serve()
