"""Requirements of torch.compile on this machine, and the flags that keep it right.

This module does not load torch, so that code that only plans can use it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# With generic tuning gcc 12.2 miscompiles two 32 x 32 bfloat16 transposes in one kernel, as the backward
# pass of rotary positions has them: a tenth of the gradient is garbage or NaN. -march=native means
# generic tuning if gcc does not know the processor. Each of these names brings a specific tuning;
# the first whose instructions the processor has is taken.
TUNED_NAMES = (
    ("cooperlake", ("avx512_bf16", "avx512vl", "avx512_vnni")),
    ("icelake-server", ("avx512_vbmi2", "avx512vl", "avx512_vnni")),
    ("skylake-avx512", ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")),
    ("haswell", ("avx2", "fma", "bmi2")),
)


def cpp_compiler() -> str | None:
    """Path of the compiler that torch.compile would use on the CPU, or None if there is none."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def missing_for_compiling(device: str) -> str | None:
    """The requirement that torch.compile lacks for devices of this type (cpu, cuda), for a message;
    None: nothing."""
    if device == "cpu":
        if cpp_compiler() is None:
            return "a C++ compiler"
        return None if _python_header().is_file() else f"Python's header files ({_python_header()})"
    if device == "cuda":
        # Triton builds its launcher in C the first time that a kernel runs.
        if find_spec("triton") is None:
            return "the package triton"
        if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang")):
            return "a C compiler"
        return None if _python_header().is_file() else f"Python's header files ({_python_header()})"
    return "a device of type cpu or cuda"


def _python_header() -> Path:
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme names a folder that has no headers.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    return Path(sysconfig.get_path("include", scheme)) / "Python.h"


def set_tuning() -> None:
    """Set the processor that torch's compiler for CPUs tunes for, if it would not by itself.

    Does nothing where ``TORCHINDUCTOR_CPP_MARCH`` has been set, and under torch below 2.12, which has no
    such setting; there the check before the first step finds wrong kernels.
    """
    from torch._inductor import config

    if getattr(config.cpp, "march", "unknown") is None and (name := tuned_name()) is not None:
        config.cpp.march = name
    # Kernels use the current number of threads: a run on a busy machine may go on with one.
    config.cpp.dynamic_threads = True


@cache
def tuned_name() -> str | None:
    """A value of gcc's ``-march`` that tunes for a processor.

    None where ``-march=native`` has such tuning already, where the compiler is not gcc, and on other
    processors than x86-64.
    """
    compiler = cpp_compiler()
    if compiler is None or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    command = [compiler, "-march=native", "-Q", "--help=target"]
    try:
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = dict(re.findall(r"^\s*-(march|mtune)=\s+(\S+)", answer.stdout, re.MULTILINE))
    if found.get("mtune") != "generic":  # clang does not know the question
        return None
    if found["march"] != "native" and not found["march"].startswith("x86-64"):
        return found["march"]
    flags = processor_flags()
    return next((name for name, needs in TUNED_NAMES if flags.issuperset(needs)), None)


def processor_flags() -> set[str]:
    """Names of the processor's instruction sets; the kernel lists them where it is Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    return set(text.partition("\nflags")[2].partition("\n")[0].split())
