"""Executors by name: several processes here, Ray and SLURM, to the bits of one process after the other."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from executor_overhead import (
    RayNodes,
    meanwhile,
    preempt_and_kill,
    results,
    tiny_seven,
    wait_for_checkpoints,
)
from executors import InProcess
from reporters import Watcher
from storylab.cli import main
from storylab.config import TrainConfig
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.execution.executors import EXECUTORS, make_executor
from storylab.execution.job import Event, Job, Outcome, Progress, paced
from storylab.execution.local import LocalExecutor
from storylab.experiments.attempts import MOST_LOSSES
from storylab.experiments.confounds import speed_confounds
from storylab.experiments.plan import PlannedRun
from storylab.experiments.scheduler import run_experiment
from storylab.planning.estimate import Estimate, EstimatedExecutor
from storylab.record.folder import RunFolder
from storylab.record.run import load_run

MakeConfig = Callable[..., TrainConfig]
ARMS = ("2e-3", "linear", "6e-3")


@pytest.fixture(scope="module")
def reference(
    dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[object]]:
    """Losses of three arms of experiment 7, trained one after the other with one thread."""
    planned = tiny_seven(dataset, tmp_path_factory.mktemp("reference"), ARMS)
    assert run_experiment(planned, LocalExecutor(threads=1), Watcher()) == ["finished"] * 3
    return results(planned)


# Names, flags and options


@pytest.mark.parametrize(
    ("name", "jobs", "options", "message"),
    [
        ("local", 0, [], "--jobs is 0: it must be at least 1"),
        ("local", 10**6, [], "is more than the"),
        ("local", 1, ["cpus=2"], "local has no option cpus: it has none"),
        ("local", 1, ["cpus"], "cpus: write KEY=VALUE"),
        ("slurm", 1, ["cluster=mine"], "cluster=mine: use slurm or local"),
        ("slurm", 1, ["cluster=local", "cpus=0"], "it must be a number of at least 1"),
        ("slurm", 1, ["cluster=local", "partitoin=a"], "Unknown argument 'partitoin'"),
        ("slurm", 1, [], "slurm"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    name: str, jobs: int, options: list[str], message: str, tmp_path: Path
) -> None:
    if name == "slurm":
        pytest.importorskip("submitit")
    with pytest.raises(UserError) as caught:
        make_executor(name, jobs, options, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(EXECUTORS) - {"local"}))
def test_a_missing_library_is_named_with_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = {"ray": "ray", "slurm": "submitit"}[name]
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"storylab.execution.{name}", raising=False)
    with pytest.raises(UserError, match=rf"pip install 'storylab\[{name}\]'"):
        make_executor(name, None, [], tmp_path)


@pytest.mark.slow
def test_the_help_imports_no_library_of_an_executor() -> None:
    script = "import sys, storylab.cli; storylab.cli.main(['experiment', 'run', '--help'])\n"
    script = f"try:\n  {script.strip()}\nexcept SystemExit: pass\n"
    script += "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'submitit')))"
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_events_come_at_most_once_a_second_and_the_last_ones_always() -> None:
    events: list[Event | Outcome] = [Progress("training", done, 5) for done in range(1, 6)]
    events += [Progress("evaluating", 1, 2), Outcome("done")]
    assert list(paced(iter(events))) == [events[0], events[4], events[6]]
    assert list(paced(iter(events), 0.0)) == events


# Runs that share this machine


class Together:
    """Counts the jobs that run at the same time in place of processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()
        monkeypatch.setattr("storylab.execution.local._start", lambda *_: self)
        monkeypatch.setattr("storylab.execution.local._converse", self.converse)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def converse(self, child: object, job: Job) -> Iterator[Outcome]:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.1)
        with self._lock:
            self.now -= 1
        yield Outcome("done")


@pytest.mark.parametrize(
    ("needs", "most"),
    [([1, 1, 1], 3), ([6, 6, 6], 1), ([4, 4, 4], 2), ([None, 1, 1], 2), ([99, 99, 1], 1)],
)
def test_jobs_begin_while_their_memory_fits(
    needs: list[float | None],
    most: int,
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = Together(monkeypatch)
    executor = LocalExecutor(3, memory_bytes=10)
    threads = [
        threading.Thread(
            target=executor.run, args=(Job("train", tiny_config(), memory_bytes=need), print)
        )
        for need in needs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together.most == most


def test_the_estimate_of_a_run_comes_with_its_job(
    dataset: Dataset, tmp_path: Path, tiny_config: MakeConfig
) -> None:
    first, second = tiny_seven(dataset, tmp_path, ARMS[:2])
    inner = InProcess(lambda job: Outcome("done"))
    estimates = [(first, Estimate(seconds=3.0, memory_bytes=5e8, measured=False)), (second, None)]
    executor = EstimatedExecutor(inner, estimates)
    for job in (
        Job("train", first.config),
        Job("train", second.config),
        Job("bench", first.config),
    ):
        executor.run(job, print)
    assert [(job.seconds, job.host_memory_bytes) for job in inner.jobs] == [
        (3.0, 5e8),
        (None, None),
        (None, None),
    ]
    gpu = Job("train", tiny_config(device="cuda:1"), memory_bytes=5e8)
    assert (gpu.gpus, gpu.host_memory_bytes) == (1, None)


@pytest.mark.slow
def test_two_processes_at_a_time_give_the_bits_of_one(
    dataset: Dataset, tmp_path: Path, reference: dict[str, list[object]]
) -> None:
    """And the record says that they shared the machine, so that their speeds count for nothing."""
    planned = tiny_seven(dataset, tmp_path, ARMS)
    cores = psutil.cpu_count() or 1
    executor = LocalExecutor(2, threads=1, shared=True, memory_bytes=1e12)
    assert run_experiment(planned, executor, Watcher()) == ["finished"] * 3
    assert results(planned) == reference
    runs = [load_run(run.folder) for run in planned]
    assert all(run.environment.threads == 1 for run in runs)
    assert any("shared machine" in text for text in speed_confounds(runs[0], runs[1]))
    chosen = make_executor("local", cores, [], tmp_path)
    assert chosen.slots == cores


# A machine that is lost


def test_a_run_that_loses_its_machine_goes_on(dataset: Dataset, tmp_path: Path) -> None:
    planned = tiny_seven(dataset, tmp_path, ARMS[:1])
    lost = Outcome("lost", "a node was lost")

    def answer(job: Job) -> Outcome:
        assert job.config.batch_size == planned[0].config.batch_size
        checkpoint = RunFolder(planned[0].folder).checkpoint("last")
        if len(executor.jobs) <= 2 * MOST_LOSSES:  # every other try gets further
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.touch()
            os.utime(checkpoint, ns=(1, 1 + len(executor.jobs) // 2))
        return lost

    executor, watcher = InProcess(answer), Watcher()
    assert run_experiment(planned, executor, watcher) == ["failed"]
    assert "a node was lost; going on from its checkpoint" in watcher.lines[0]
    # Given up once it loses its machine again and again without a new checkpoint.
    assert len(executor.jobs) == 2 * MOST_LOSSES + MOST_LOSSES
    assert "a node was lost" in watcher.lines[-1]


# Clusters


@pytest.fixture
def forgotten_processes() -> Iterator[None]:
    """submitit's stand-in for SLURM forgets a process that it started before; its warning belongs to the
    test that began it, not to a later one."""
    yield
    gc.collect()


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("forgotten_processes")
def test_slurm_requeues_a_preempted_run_and_a_lost_one_begins_again(
    dataset: Dataset, tmp_path: Path, reference: dict[str, list[object]]
) -> None:
    """With submitit's stand-in for SLURM: one job is signaled, all its processes, and one is killed."""
    pytest.importorskip("submitit")
    planned = tiny_seven(dataset, tmp_path, ARMS)
    executor = make_executor("slurm", 2, ["cluster=local", "cpus=1"], tmp_path)
    watcher = Watcher()
    with meanwhile(lambda: preempt_and_kill(planned)):
        assert run_experiment(planned, executor, watcher) == ["finished"] * 3
    assert results(planned) == reference
    assert sum("left no result" in line and "going on" in line for line in watcher.lines) == 1
    runs = [load_run(run.folder) for run in planned]
    assert sum(len(run.environment.resumed) for run in runs) == 2
    assert all(stage.shared_machine for run in runs for stage in run.stages)


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("forgotten_processes")
def test_a_stop_reaches_a_slurm_job(
    dataset: Dataset, tmp_path: Path, tiny_config: MakeConfig
) -> None:
    pytest.importorskip("submitit")
    executor = make_executor("slurm", 1, ["cluster=local", "cpus=1"], tmp_path)
    config = tiny_config(max_iters=100_000)

    def stop(event: Event) -> None:
        if event.name == "training":
            executor.stop()

    outcome = executor.run(Job("train", config), stop)
    assert outcome.status == "interrupted"
    assert config.out_dir is not None and RunFolder(config.out_dir).checkpoint("last").exists()


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray: pip install 'storylab[ray]'")
@pytest.mark.filterwarnings("ignore")
def test_ray_survives_the_death_of_a_node(
    dataset: Dataset, tmp_path: Path, reference: dict[str, list[object]]
) -> None:
    """A cluster of two nodes; one is killed with all its processes while both train."""
    planned = tiny_seven(dataset, tmp_path, ARMS)
    nodes, killed, watcher = RayNodes(), [], Watcher()

    def kill() -> None:
        wait_for_checkpoints(planned, 2)
        killed.append(nodes.kill_second())

    try:
        executor = make_executor("ray", None, nodes.options, tmp_path)
        assert executor.slots == 2
        with meanwhile(kill):
            assert run_experiment(planned, executor, watcher) == ["finished"] * 3
    finally:
        nodes.close()
    assert killed == [1] and results(planned) == reference
    assert sum("a node was lost" in line for line in watcher.lines) == 1


def test_an_executor_is_chosen_by_flags(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned: list[PlannedRun] = tiny_seven(dataset, tmp_path, ARMS)
    assert planned
    file = str(tmp_path / "07-learning-rates.toml")
    flags = ["--data_dir", str(dataset.folder), "--runs", str(tmp_path), "--dry_run"]
    assert main(["experiment", "run", file, *flags, "--jobs", "0"]) == 2
    assert "--jobs is 0" in capsys.readouterr().err
    words = ["--executor_options", "a=b"]
    assert main(["experiment", "confirm", file, *flags, *words]) == 2
    assert "local has no option a" in capsys.readouterr().err


# What a job asks SLURM for, and what becomes of it: with programs in the place of SLURM's


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for SLURM's programs: sbatch keeps the script and accepts it as job 17."""
    pytest.importorskip("submitit")
    folder = tmp_path / "slurm"
    folder.mkdir()
    program(folder, "srun", "exit 1")
    program(folder, "sbatch", f"cp $1 {folder}/script; echo Submitted batch job 17")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr("submitit.Job._results_timeout_s", 0)
    import_module("submitit.slurm.slurm").SlurmJob.watcher.clear()  # it remembers job 17
    return folder


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.posix
@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("OUT_OF_MEMORY", "out of memory"),
        ("CANCELLED by 0", "interrupted"),
        ("NODE_FAIL", "lost"),
    ],
)
def test_a_slurm_job_asks_for_what_the_run_needs(
    state: str, status: str, slurm: Path, tmp_path: Path, tiny_config: MakeConfig
) -> None:
    program(slurm, "sacct", f"echo 'JobID|State|NodeList'; echo '17|{state}|n1'")
    options = ["partition=long", "cpus=3", "constraint=a100"]
    executor = make_executor("slurm", None, options, tmp_path / "runs")
    job = Job("train", tiny_config(), seconds=3600.0, memory_bytes=10e9)
    assert executor.run(job, print).status == status
    script = (slurm / "script").read_text()
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in script.splitlines()
        if line.startswith("#SBATCH --")
    )
    assert asked["mem"] == "13GB" and asked["time"] == "120" and asked["cpus-per-task"] == "3"
    assert asked["partition"] == "long" and asked["constraint"] == "a100"
    assert asked["gpus-per-node"] == "0" and asked["signal"].startswith("USR2@")


@pytest.mark.posix
def test_a_job_that_slurm_refuses_has_failed(
    slurm: Path, tmp_path: Path, tiny_config: MakeConfig
) -> None:
    program(slurm, "sbatch", "echo invalid partition specified: mine >&2; exit 1")
    executor = make_executor("slurm", None, ["partition=mine"], tmp_path / "runs")
    outcome = executor.run(Job("train", tiny_config(device="cuda")), print)
    assert outcome.status == "failed" and "invalid partition specified: mine" in outcome.reason
