"""Provenance of a run: its code version, packages and machine."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import io
import os
import platform
import subprocess
import sys
import time
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import storylab
from storylab.record.schema import CudaVersions, Packages, Stage

# Code that decides a run's numbers: a change elsewhere, in the report say, makes no new version.
NUMERIC_CODE = (
    *("config", "optim", "data", "model", "precision", "training"),
    "record/checkpoint.py",
)
# Modules of those packages, and a folder, that only report, time or check, and cannot change a number.
NON_NUMERIC_MODULES = (
    *("training/check.py", "training/checking.py", "training/checks", "training/fenced.py"),
    *("training/log_format.py", "training/measure.py", "training/observers.py"),
    *("training/recorder.py", "training/signals.py", "training/silent_folder.py"),
    "training/telemetry.py",
)
# Environment variable of a process that shares its machine: other runs may use it at the same time.
SHARED_MACHINE = "STORYLAB_SHARED_MACHINE"
# Code versions that `benchmarks/same_bits.py` has shown to give equal bits: SHA-256 of each, as
# :func:`code_sha256` gives it, with the one that represents them all. To add one, run the benchmark against
# the commit that has it, and map its hash to the representative of the current code.
EQUIVALENT_CODE: Mapping[str, str] = {}


def representative(code: str, table: Mapping[str, str] | None = None) -> str:
    """The code version that represents ``code`` in comparisons: itself, unless the table has it.

    Args:
        code: a code version, as :func:`code_sha256` gives it.
        table: by default ``EQUIVALENT_CODE``.
    """
    table = EQUIVALENT_CODE if table is None else table
    seen = {code}
    while (after := table.get(code)) is not None:
        if after in seen:
            raise AssertionError(f"the table of equivalent code goes in a circle at {after}")
        seen.add(after)
        code = after
    return code


def current_stage() -> Stage:
    """Code version, packages and machine of this process."""
    # Imported here, as reading a run needs none of them, and torch takes a second to load.
    import numpy
    import psutil
    import torch

    return Stage(
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        command=list(sys.argv),
        storylab=storylab.__version__,
        code_sha256=code_sha256(),
        git_commit=_git_commit(),
        python=platform.python_version(),
        packages=Packages(
            torch=str(torch.__version__),  # with the build, which its metadata may not name
            numpy=numpy.__version__,
            safetensors=_version("safetensors"),
            tiktoken=_version("tiktoken"),
            tokenizers=_version("tokenizers"),
            pyarrow=_version("pyarrow"),
        ),
        cuda=cuda_versions(),
        platform=platform.platform(),
        processor=_processor(),
        cpu=torch.backends.cpu.get_cpu_capability(),
        memory_bytes=psutil.virtual_memory().total,
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        world_size=_world_size(),
        shared_machine=bool(os.environ.get(SHARED_MACHINE)),
    )


def _world_size() -> int:
    """Number of processes that torch.distributed has joined to this one, itself included."""
    import torch.distributed as dist

    joined = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if joined else 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda_versions() -> CudaVersions | None:
    """Versions of the CUDA libraries and the driver, and the GPU's memory; None without a CUDA device."""
    import torch

    if not torch.cuda.is_available():
        return None
    return CudaVersions(
        runtime=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        triton=_version("triton"),
        driver=_driver(),
        memory_bytes=torch.cuda.get_device_properties(0).total_memory,
    )


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        version = str(pynvml.nvmlSystemGetDriverVersion())
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return version


def _processor() -> str:
    """Name of the CPU: from the kernel on Linux, else from the platform."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


@cache  # a plan asks for every run, and the code of a process stays the same
def code_sha256() -> str:
    """SHA-256 over the source that decides a run's numbers: the code version without git.

    Comments, docstrings and blank lines do not count.
    """
    root = Path(storylab.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _decides_numbers(name):
            source = bare_source(path.read_text(encoding="utf-8"))
            digest.update(name.encode() + b"\0" + source.encode())
    return digest.hexdigest()


def _decides_numbers(module: str) -> bool:
    """Whether a module, such as ``model/head.py``, counts for the code version."""
    return _among(module, NUMERIC_CODE) and not _among(module, NON_NUMERIC_MODULES)


def _among(module: str, names: Iterable[str]) -> bool:
    """Whether a module is one of ``names``, or in a folder of them."""
    return any(module == name or module.startswith(f"{name}/") for name in names)


def bare_source(source: str) -> str:
    """``source`` without comments, docstrings and blank lines.

    The text itself is edited, because ``ast.unparse`` gives different text in different versions of Python.
    """
    lines = source.splitlines()
    # From the last to the first, so that a removal does not move the places of later removals.
    for first, start, last, end in sorted(_unread_spans(source), reverse=True):
        tail = lines[last][end:]
        lines[first : last + 1] = [lines[first][:start] + tail]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _unread_spans(source: str) -> Iterator[tuple[int, int, int, int]]:
    """Line and column, from 0, where each comment and docstring begins and ends."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0] - 1, token.start[1], token.end[0] - 1, token.end[1]
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            # Columns of the syntax tree count bytes, those of the text characters.
            last = (node.end_lineno or node.lineno) - 1
            begin = len(lines[node.lineno - 1].encode()[: node.col_offset].decode())
            end = len(lines[last].encode()[: node.end_col_offset].decode())
            yield node.lineno - 1, begin, last, end


def _git_commit() -> str | None:
    """Commit of the checkout that the package runs from, with "-dirty" if it has changes."""
    if "site-packages" in Path(__file__).parts:
        return None  # an installed copy; a repository around it would be someone else's
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            encoding="utf-8",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
