"""Run each job as a job of a SLURM cluster, submitted by submitit.

The two sides talk through files in a folder of the job in the folder of runs, which all machines see: there
is no other way to reach a job that waits in a queue or is moved. submitit adds its own files there, among
them pickled ones.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError

from storylab.errors import UserError
from storylab.execution.executors import ExecutorRequest
from storylab.execution.job import Event, Job, OnEvent, Outcome, decode, encode, paced
from storylab.execution.local import LocalExecutor
from storylab.files import exists, make_folder, read_text, write_text

# The folder in RUNS with one folder for each submitted job.
JOBS = ".jobs"
# Files of a job's folder: the newest event, the outcome, and a sign that the job shall stop.
EVENT, OUTCOME, STOP = "event.json", "outcome.json", "stop"
# How often each side looks for the files of the other.
_WAIT_SECONDS, _NODE_WAIT_SECONDS = 1.0, 0.2
# Jobs at a time, and CPUs of each, by default.
_SLOTS, _CPUS = 32, 4
# Minutes of a job whose duration is not known, and the fewest of others, which get twice the expected time.
_UNKNOWN_MINUTES, _LEAST_MINUTES = 60, 15
# Expected memory is that of a process that did little else.
_MEMORY_MARGIN = 1.25
# A job whose time is over is requeued and goes on from its checkpoint; this ends those without progress.
_MOST_TIMEOUTS = 1000


class _NodeJob:
    """A job as submitit pickles it and calls it on a node.

    Args:
        job: the job as JSON.
        folder: the job's folder.
        threads: threads of the job.
        shared: whether other jobs may use the node.
    """

    def __init__(self, job: str, folder: str, threads: int, shared: bool) -> None:
        self._arguments = job, folder, threads, shared
        self._ended = self._preempted = False

    def __call__(self) -> None:
        """Carry the job out, unless it had ended when it was requeued."""
        job, name, threads, shared = self._arguments
        self._job, self._folder = Job.from_json(job), Path(name)
        self._executor = LocalExecutor(threads=threads, shared=shared)
        if not exists(self._folder / OUTCOME):
            threading.Thread(target=self._carry_out).start()
            self._wait()

    def checkpoint(self) -> DelayedSubmission:
        """Have the job save its work; called by submitit's signal handler, which then requeues it."""
        self._preempted = True
        self._executor.stop()
        self._wait()
        return DelayedSubmission(_NodeJob(*self._arguments))

    def _wait(self) -> None:
        # The handler above interrupts this in the main thread. A lock that the main thread held then would
        # never be free, so there is none.
        while not self._ended:
            if exists(self._folder / STOP):
                self._executor.stop()
            time.sleep(_NODE_WAIT_SECONDS)

    def _carry_out(self) -> None:
        try:
            write_text(self._folder / EVENT, "")  # it has begun
            for message in paced(self._executor.messages(self._job)):
                if not isinstance(message, Outcome):
                    write_text(self._folder / EVENT, encode(message))
                elif self._is_final(message):
                    write_text(self._folder / OUTCOME, encode(message))
        finally:
            self._ended = True

    def _is_final(self, outcome: Outcome) -> bool:
        """Whether an outcome is the job's own, and no consequence of SLURM's signals to its processes."""
        if outcome.status in ("done", "diverged"):
            return True
        if outcome.status == "interrupted":
            return exists(self._folder / STOP)
        return not self._preempted


class SlurmExecutor:
    """Runs jobs on the nodes of a SLURM cluster.

    All nodes have storylab installed, and see the working directory, the data and the run folders under the
    same paths.

    Args:
        slots: how many jobs to submit at the same time.
        threads: CPUs and threads of each job.
        jobs: the folder for the folders of jobs.
        cluster: ``slurm``, or ``local`` for submitit's stand-in that runs jobs here.
        options: parameters of submitit, which win over those from the job's expectations.

    Raises:
        UserError: there is no SLURM here, or submitit does not know an option.
    """

    def __init__(
        self, slots: int, threads: int, jobs: Path, cluster: str, options: Mapping[str, Any]
    ) -> None:
        self.slots, self._threads = slots, threads
        self._jobs, self._cluster, self._options = jobs, cluster, options
        self._stopped = False
        self._submitting = threading.Lock()  # submitit keeps the state of all jobs in one place
        make_folder(jobs)
        try:
            self._submitter(jobs).update_parameters(**options)
        except (RuntimeError, ValueError, NameError) as error:
            raise UserError(f"--executor slurm: {str(error).splitlines()[0]}") from error

    def run(self, job: Job, on_event: OnEvent) -> Outcome:
        """See :class:`storylab.execution.job.Executor`."""
        out_dir = job.config.out_dir
        prefix = f"{out_dir.name if out_dir else job.action}-"
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self._jobs.resolve()))
        shared = "slurm_exclusive" not in self._options
        try:
            with self._submitting:
                submitter = self._submitter(folder)
                submitter.update_parameters(**(self._resources(job) | dict(self._options)))
                node_job = _NodeJob(job.to_json(), str(folder), self._threads, shared)
                handle = submitter.submit(node_job)
        except (FailedJobError, OSError) as error:
            return Outcome("failed", f"SLURM refused the job: {' '.join(str(error).split())[:200]}")
        return self._follow(handle, folder, on_event)

    def stop(self) -> None:
        """See :class:`storylab.execution.job.Executor`."""
        self._stopped = True

    def _follow(self, handle: submitit.Job[None], folder: Path, on_event: OnEvent) -> Outcome:
        """Pass the events of a submitted job on; returns its outcome."""
        last: Event | None = None
        asked = False
        while True:
            with self._submitting:
                ended = handle.done()  # before the files are read, so that none is missed
            outcome = _read(folder / OUTCOME)
            if isinstance(outcome, Outcome):
                return outcome
            if ended:
                return _sudden_end(handle)
            event = _read(folder / EVENT)
            if event is not None and not isinstance(event, Outcome) and event != last:
                last = event
                on_event(event)
            if self._stopped and not asked:
                asked = True
                write_text(folder / STOP, "")
                if not exists(folder / EVENT):
                    handle.cancel(check=False)
                    return Outcome("interrupted", "stopped before it began")
            time.sleep(_WAIT_SECONDS)

    def _submitter(self, folder: Path) -> submitit.AutoExecutor:
        return submitit.AutoExecutor(
            folder, cluster=self._cluster, slurm_max_num_timeout=_MOST_TIMEOUTS
        )

    def _resources(self, job: Job) -> dict[str, Any]:
        """The resources that a job asks SLURM for, in submitit's names."""
        minutes: float = _UNKNOWN_MINUTES
        if job.seconds is not None:
            minutes = max(2 * job.seconds / 60, _LEAST_MINUTES)
        asked: dict[str, Any] = {
            "name": "storylab",
            "timeout_min": math.ceil(minutes),
            "cpus_per_task": self._threads,
            "gpus_per_node": job.gpus,
        }
        if job.host_memory_bytes is not None:
            asked["mem_gb"] = math.ceil(_MEMORY_MARGIN * job.host_memory_bytes / 1e9)
        return asked


def executor(request: ExecutorRequest) -> SlurmExecutor:
    """Runs jobs on the SLURM cluster of this machine.

    The option ``cpus`` is the number of CPUs and threads of each job, ``time`` its minutes, ``mem_gb`` its
    memory; ``cluster=local`` runs jobs here as SLURM would. Any other is an option of sbatch under
    submitit's name, such as ``partition``.

    Raises:
        UserError: there is no SLURM here, or it has no such option.
    """
    cluster = request.options.get("cluster", "slurm")
    if cluster not in ("slurm", "local"):
        raise UserError(f"--executor_options cluster={cluster}: use slurm or local")
    options: dict[str, Any] = {}
    for name, value in request.options.items():
        if name == "time":
            options["timeout_min"] = request.count(name, 0)
        elif name == "mem_gb":
            options[name] = request.count(name, 0)
        elif name not in ("cpus", "cluster"):
            options[f"slurm_{name}"] = int(value) if value.isdecimal() else value
    cpus = request.count("cpus", _CPUS)
    return SlurmExecutor(request.jobs or _SLOTS, cpus, request.runs / JOBS, cluster, options)


def _read(path: Path) -> Event | Outcome | None:
    """The message in a file; None without one."""
    return decode(read_text(path)) if exists(path) else None


def _sudden_end(handle: submitit.Job[None]) -> Outcome:
    """The outcome of a job that ended without one."""
    state = str(handle.state).upper()
    if state.startswith("CANCELLED"):
        return Outcome("interrupted", f"the SLURM job {handle.job_id} was cancelled")
    if state.startswith("OUT_OF_ME"):
        return Outcome("out of memory", f"SLURM ended the job {handle.job_id} for want of memory")
    status: Any = "failed" if isinstance(handle.exception(), FailedJobError) else "lost"
    place = handle.paths.stderr
    return Outcome(status, f"the SLURM job {handle.job_id} left no result ({state}): see {place}")
