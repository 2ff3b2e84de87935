"""placeholder"""

from pathlib import Path


def write_report(runs: Path, out: Path) -> Path:
    return out
