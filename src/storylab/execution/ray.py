"""Run each job on a node of a Ray cluster, in a process that this node's Ray starts for it alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from storylab.errors import UserError
from storylab.execution.executors import ExecutorRequest
from storylab.execution.job import Job, OnEvent, Outcome, decode, encode, paced
from storylab.execution.local import LocalExecutor

# How long to wait for a message before looking for a stop.
_WAIT_SECONDS = 1.0
# The first message of a node: it has begun.
_BEGUN = ""


class _Node:
    """An actor that carries out one job on the node where Ray places it.

    Args:
        folder: the working directory of the process that submits the job, from which the paths in it count.
        threads: threads of the job.
    """

    def __init__(self, folder: str, threads: int) -> None:
        self._folder = folder
        self._executor = LocalExecutor(threads=threads, shared=True)

    def messages(self, job: str) -> Iterator[str]:
        """Carry a job out; yields a sign that it has begun, its encoded events, and its outcome."""
        yield _BEGUN
        os.chdir(self._folder)
        for message in paced(self._executor.messages(Job.from_json(job))):
            yield encode(message)

    def stop(self) -> None:
        """Have the job save its work and end."""
        self._executor.stop()


class RayExecutor:
    """Runs jobs on the cluster that this process is connected to.

    Each job asks for CPUs, for a GPU if its config names one, and for its expected memory. All nodes have
    storylab installed, and see the data and the run folders under the same paths.

    Args:
        slots: how many jobs to submit at the same time; Ray queues those that do not fit.
        threads: CPUs and threads of each job.
    """

    def __init__(self, slots: int, threads: int) -> None:
        self.slots, self._threads = slots, threads
        self._stopped = False

    def run(self, job: Job, on_event: OnEvent) -> Outcome:
        """See :class:`storylab.execution.job.Executor`."""
        # Two calls at a time: of the job's messages, and of stop.
        actor = ray.remote(_Node).options(max_concurrency=2, **self._resources(job))
        node = actor.remote(str(Path.cwd()), self._threads)
        try:
            return self._follow(node, job, on_event)
        except RayTaskError as error:  # of our own code there
            return Outcome("failed", f"on a node: {error.cause!r}")
        except RayError as error:
            return Outcome("lost", f"a node was lost ({type(error).__name__})")
        finally:
            ray.kill(node)

    def stop(self) -> None:
        """See :class:`storylab.execution.job.Executor`."""
        self._stopped = True

    def _follow(self, node: Any, job: Job, on_event: OnEvent) -> Outcome:
        """Start a job on a node, pass its events on, and return its outcome."""
        stream = node.messages.options(num_returns="streaming").remote(job.to_json())
        begun = asked = False
        while True:
            if self._stopped and not begun:
                return Outcome("interrupted", "stopped before it began")
            if self._stopped and not asked:
                asked = True
                node.stop.remote()
            ready, _ = ray.wait([stream], timeout=_WAIT_SECONDS)
            if not ready:
                continue
            line = ray.get(next(stream))
            begun = True
            message = decode(line)
            if isinstance(message, Outcome):
                return message
            if message is not None:
                on_event(message)

    def _resources(self, job: Job) -> dict[str, float]:
        """The resources that a job asks Ray for. None asks for more memory than the largest node has: there
        it runs, or runs out of memory."""
        largest = max(node["Resources"].get("memory", 0.0) for node in _alive_nodes())
        memory = int(min(job.host_memory_bytes or 0.0, largest))
        return {"num_cpus": self._threads, "num_gpus": job.gpus, "memory": memory}


def executor(request: ExecutorRequest) -> RayExecutor:
    """Runs jobs on the cluster at the option ``address``; by default on the one of this machine or of the
    variable RAY_ADDRESS, or else on a new one that ends with this process.

    The option ``cpus`` is the number of CPUs and threads of each job, by default all of the smallest node.

    Raises:
        UserError: there is no such cluster or option, or no node has so many CPUs.
    """
    request.require_known("ray", ("address", "cpus"))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = request.options.get("address")
    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot reach a Ray cluster: {str(error).splitlines()[0]}") from error
    counts = [int(node["Resources"].get("CPU", 0)) for node in _alive_nodes()]
    cpus = request.count("cpus", min(filter(None, counts), default=1))
    together = sum(count // cpus for count in counts)
    if not together:
        raise UserError(
            f"no node of the Ray cluster has {cpus} CPUs: the largest has {max(counts)}"
        )
    return RayExecutor(request.jobs or together, cpus)


def _alive_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]
