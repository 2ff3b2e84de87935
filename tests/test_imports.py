"""Which module imports which, and how little is loaded for small jobs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import storylab
from storylab.data.dataset import Dataset

ROOT = Path(__file__).parents[1]
SOURCE = Path(storylab.__file__).parents[1]


def loaded(script: str) -> set[str]:
    """The modules that are loaded after ``script``, in a separate interpreter."""
    command = [sys.executable, "-c", f"{script}\nimport sys; print(*sys.modules)"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return set(answer.stdout.splitlines()[-1].split())


def test_imports_point_one_way() -> None:
    """The contracts in pyproject.toml, file by file; imports inside functions count, too."""
    script = f"""import sys; sys.path.insert(0, {str(SOURCE)!r})
from importlinter.cli import lint_imports
sys.exit(lint_imports(no_cache=True))"""
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_opening_a_data_set_loads_no_pyarrow(dataset: Dataset) -> None:
    script = f"""from pathlib import Path
from storylab.data.dataset import load_dataset
load_dataset(Path({str(dataset.folder)!r}))"""
    assert "pyarrow" not in loaded(script)


def test_help_and_listings_load_little(tmp_path: Path) -> None:
    """The list of verbs starts as fast as it does because it needs no parser; a listing reads no array."""
    verbs = loaded("from storylab.cli import main; main(['--help'])")
    assert not {"tyro", "msgspec", "rich", "numpy", "storylab.config", "subprocess"} & verbs
    runs = loaded(f"from storylab.cli import main; main(['list', '--runs', {str(tmp_path)!r}])")
    assert not {"numpy", "torch", "tiktoken", "urllib.request", "storylab.data.dataset"} & runs


def test_a_plan_loads_no_torch() -> None:
    assert "torch" not in loaded("import storylab.planning.roofline, storylab.planning.plan_text")
