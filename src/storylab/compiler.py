"""The C++ compiler that torch.compile needs on a CPU."""

from __future__ import annotations

import os
import shutil


def cpp_compiler() -> str | None:
    """Path of the compiler that torch.compile would use on the CPU, or None where there is none."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)
