"""The wheel and the source archive hold what a user needs, and nothing of the tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# As `python -m build` does it, but with the setuptools of this environment: no network.
BUILD = (
    "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])('dist'))"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package's source; building leaves files in it."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("setuptools is older than the package needs")
    folder = tmp_path_factory.mktemp("package") / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", folder / "src", ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "dist").mkdir()
    return folder


def built(source: Path, hook: str) -> Path:
    command = [sys.executable, "-c", BUILD, hook]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return source / "dist" / result.stdout.splitlines()[-1]


def package_files(source: Path) -> set[str]:
    """Every file of the package, of whatever kind, as its path below src."""
    root = source / "src"
    files = (path for path in root.rglob("*") if path.is_file() and "egg-info" not in str(path))
    return {path.relative_to(root).as_posix() for path in files}


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(source: Path, tmp_path: Path) -> None:
    """Templates, the page's files and the type marker too; and the command runs from it alone."""
    with zipfile.ZipFile(built(source, "build_wheel")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert names == package_files(source)
        assert {"storylab/export/card.md.j2", "storylab/ui/static/app.js"} <= names
        (entries,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "storylab = storylab.cli:main" in wheel.read(entries).decode()
        wheel.extractall(tmp_path / "installed")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from storylab import cli; "
        "print(cli.__file__); sys.exit(cli.main(['--help']))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "installed")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and str(tmp_path / "installed") in result.stdout
    assert "usage: storylab VERB" in result.stdout


@pytest.mark.slow
def test_the_source_archive_can_be_built_from(source: Path) -> None:
    with tarfile.open(built(source, "build_sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {f"src/{name}" for name in package_files(source)}
    assert needed | {"pyproject.toml", "README.md", "LICENSE"} <= names
