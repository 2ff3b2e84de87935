"""Compare the executors: equal results under kills, and seconds that each adds to a run.

python benchmarks/executor_overhead.py [--executors jobs ray slurm] [--arms 2e-3 ...] [--jobs 5]

First trains experiment 7 at a tiny scale with every executor: `local`, one run after the other; `jobs`,
two local processes at a time; `ray`, a cluster of two nodes on this machine, one of which is killed with
all its processes in the middle; `slurm`, submitit's local stand-in, one job of which is preempted by a
signal and one killed. Every run has one thread. Then compares all losses with those of `local`, to the bit.

Then has each executor carry out jobs that end as soon as their process has read them, one at a time and in
turns, and prints the median seconds. The extras `ray` and `slurm` must be installed. Two cores and 4 GB of
memory are enough; a Ray node needs its 15 seconds to start, so other programs should be few.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from storylab.config import TrainConfig
from storylab.data.dataset import Dataset
from storylab.data.prepare import PrepareConfig, prepare
from storylab.execution.executors import make_executor
from storylab.execution.job import Executor, Job
from storylab.execution.local import LocalExecutor
from storylab.experiments.plan import PlannedRun, plan_runs
from storylab.experiments.scheduler import run_experiment
from storylab.experiments.spec import load_experiment
from storylab.record.folder import STORY_LOSSES, SUMMARY, RunFolder
from storylab.record.schema import EvaluationRow, IterationRow

SEVEN = Path(__file__).parents[1] / "experiments/07-learning-rates.toml"
TINY = {
    "n_layer": 1,
    "n_head": 1,
    "n_kv_head": 1,
    "n_embd": 32,
    "n_hidden": 64,
    "batch_size": 4,
    "block_size": 32,
    "max_iters": 120,
    "warmup_iters": 60,
    "eval_interval": 20,
    "eval_iters": 1,
}
NAMES = ("jobs", "ray", "slurm")
WORKER = "storylab.execution.worker"


class Printed:
    """A reporter that keeps the lines, and prints them after a word."""

    def __init__(self, name: str) -> None:
        self.name, self.lines = name, list[str]()

    def line(self, text: str) -> None:
        """See :class:`storylab.experiments.scheduler.ExperimentReporter`."""
        self.lines.append(text)
        print(f"{self.name}: {text}", flush=True)

    def progress(self, name: str, done: int, total: int) -> None:
        """Shows nothing."""

    def overall(self, name: str, done: float, total: float) -> None:
        """Shows nothing."""


def tiny_seven(
    dataset: Dataset, runs: Path, only: Sequence[str] = (), **changes: Any
) -> list[PlannedRun]:
    """The runs of experiment 7 at a tiny scale: its arms and one seed, with a smaller model and fewer
    iterations. ``changes`` are fields of all configs."""
    text = SEVEN.read_text(encoding="utf-8")
    values = "\n".join(f"{name} = {value}" for name, value in (TINY | changes).items())
    config = "[scales.laptop.config]\n"
    head, _, tail = text.partition(config)
    own = [line for line in tail.splitlines() if line.split(" =")[0] not in TINY | changes]
    runs.mkdir(parents=True, exist_ok=True)
    file = runs / SEVEN.name
    rest = "\n".join([values, 'device = "cpu"', 'dtype = "float32"', *own])
    file.write_text(f"{head}{config}{rest}\n", encoding="utf-8")
    return plan_runs(load_experiment(file, "laptop"), dataset, runs, seeds=(1,), only=only)


def results(planned: Sequence[PlannedRun]) -> dict[str, list[Any]]:
    """Every loss of every run by its label: of training, of evaluations, and of each validation story."""
    found = {}
    for run in planned:
        rows = RunFolder(run.folder).read_rows()
        losses: list[Any] = [
            (row.iteration, row.loss) if isinstance(row, IterationRow) else row.val_loss
            for row in rows
            if isinstance(row, IterationRow | EvaluationRow)
        ]
        stories = hashlib.sha256((run.folder / STORY_LOSSES).read_bytes()).hexdigest()
        found[run.label] = [*losses, stories]
    return found


@contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """Do something in another thread while the block runs."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    yield
    thread.join(60)


def wait_for_checkpoints(planned: Sequence[PlannedRun], count: int) -> None:
    """Wait until ``count`` runs have a checkpoint and go on."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        under_way = [
            run
            for run in planned
            if RunFolder(run.folder).checkpoint("last").exists()
            and not (run.folder / SUMMARY).exists()
        ]
        if len(under_way) >= count:
            return
        time.sleep(0.02)
    raise TimeoutError("no checkpoints")


def kill_tree(pid: int) -> int:
    """Kill a process and all that it has started, at once; returns how many of them trained a run."""
    process = psutil.Process(pid)
    tree = [process, *process.children(recursive=True)]
    trained = 0
    for each in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            trained += WORKER in each.cmdline()
            each.kill()
    return trained


def _agent_ports() -> dict[str, int]:
    """Free ports for the helpers of a node: it waits a short time only for them to choose their own."""
    names = (
        "metrics_agent_port",
        "metrics_export_port",
        "dashboard_agent_listen_port",
        "runtime_env_agent_port",
    )
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    return dict(zip(names, ports, strict=True))


class RayNodes:
    """A Ray cluster of two nodes on this machine, each with one CPU."""

    def __init__(self) -> None:
        patience = {"RAY_raylet_start_wait_time_s": "300"}  # the machine may be busy
        os.environ.update({"RAY_USAGE_STATS_ENABLED": "0"} | patience)
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "memory": 2 << 30, "object_store_memory": 80 << 20}
        head = {**node, **_agent_ports(), "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.second = self.cluster.add_node(**node, **_agent_ports())

    @property
    def options(self) -> list[str]:
        """The ``--executor_options`` for it."""
        return [f"address={self.cluster.address}", "cpus=1"]

    def kill_second(self) -> int:
        """Kill the second node with all its processes; returns how many runs were trained there."""
        (raylet,) = self.second.all_processes["raylet"]
        return kill_tree(raylet.process.pid)

    def close(self) -> None:
        """End the cluster."""
        import ray

        ray.shutdown()
        self.cluster.shutdown()


def submitted() -> list[psutil.Process]:
    """The processes of this program's submitit jobs that run, oldest first."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "submitit.core._submit" in child.cmdline():
                found.append(child)
    return sorted(found, key=lambda process: process.create_time())


def preempt_and_kill(planned: Sequence[PlannedRun]) -> None:
    """Signal a submitted job as SLURM does before it takes the node, and kill another without warning."""
    wait_for_checkpoints(planned, 2)
    first, second = submitted()[:2]
    for process in (*first.children(recursive=True), first):
        process.send_signal(signal.SIGUSR2)  # SLURM signals every process of a job
    kill_tree(second.pid)


def trained(name: str, executor: Executor, planned: Sequence[PlannedRun]) -> list[str]:
    """Train all runs; returns the lines that the scheduler reported."""
    reporter = Printed(name)
    run_experiment(planned, executor, reporter)
    return reporter.lines


def train_all(
    name: str, planned: Sequence[PlannedRun], runs: Path, ray: RayNodes | None
) -> dict[str, Any]:
    """Train experiment 7 with an executor, kill something in the middle, and return all losses."""
    if name == "local":
        trained(name, LocalExecutor(threads=1), planned)
    elif name == "jobs":
        trained(name, make_executor("local", 2, [], runs), planned)
    elif name == "ray":
        assert ray is not None
        nodes = ray

        def kill() -> None:
            wait_for_checkpoints(planned, 2)
            print(f"ray: killed a node and {nodes.kill_second()} run on it", flush=True)

        executor = make_executor("ray", None, nodes.options, runs)
        with meanwhile(kill):
            trained(name, executor, planned)
    else:
        executor = make_executor("slurm", 2, ["cluster=local", "cpus=1"], runs)
        with meanwhile(lambda: preempt_and_kill(planned)):
            trained(name, executor, planned)
    return results(planned)


def compare(names: Sequence[str], arms: Sequence[str], place: Path, nodes: RayNodes | None) -> None:
    """Train with every executor, and print how many runs have the losses of the first."""
    data = place / "data"
    dataset = prepare(
        PrepareConfig(source="builtin", tokenizer="bpe:300", out=data, builtin_stories=300)
    )
    found = {}
    for name in names:
        planned = tiny_seven(dataset, place / name, arms)
        found[name] = train_all(name, planned, place / name, nodes)
    print("\n| executor | runs | losses compared | equal to local |\n| --- | --- | --- | --- |")
    for name, losses in found.items():
        count = sum(map(len, losses.values()))
        equal = sum(losses[label] == found[names[0]][label] for label in losses)
        print(f"| {name} | {len(losses)} | {count} | {equal} of {len(losses)} runs |")


def overhead(executors: dict[str, Executor], jobs: int) -> None:
    """Print the median seconds of a job that does nothing, with each executor."""
    nothing: Any = "nothing"  # no action, so that the process ends before it imports torch
    seconds: dict[str, list[float]] = {name: [] for name in executors}
    for _ in range(jobs):
        for name, executor in executors.items():
            began = time.perf_counter()
            outcome = executor.run(Job(nothing, TrainConfig(device="cpu")), lambda event: None)
            seconds[name].append(time.perf_counter() - began)
            assert outcome.reason.startswith("KeyError"), outcome
    base = statistics.median(seconds["local"])
    print("\n| executor | seconds of a job | more than local |\n| --- | --- | --- |")
    for name, found in seconds.items():
        median = statistics.median(found)
        spread = f"{min(found):.1f} to {max(found):.1f}"
        print(f"| {name} | {median:.1f} ({spread}) | {median - base:+.1f} |")


def main() -> None:
    """Train, compare and time; prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--executors", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--arms", nargs="+", default=(), help="of experiment 7; by default all")
    parser.add_argument("--jobs", type=int, default=5, help="that do nothing, for each executor")
    args = parser.parse_args()
    # Nodes and jobs run the same code as this process.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    names = ["local", *args.executors]
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(contextlib.closing(RayNodes())) if "ray" in names else None
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        place = Path(stack.enter_context(folder))
        compare(names, args.arms, place, nodes)
        executors: dict[str, Executor] = {"local": LocalExecutor(threads=1)}
        if nodes is not None:
            executors["ray"] = make_executor("ray", 1, nodes.options, place)
        if "slurm" in names:
            executors["slurm"] = make_executor("slurm", 1, ["cluster=local", "cpus=1"], place)
        overhead(executors, args.jobs)


if __name__ == "__main__":
    main()
