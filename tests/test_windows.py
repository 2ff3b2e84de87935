"""The CPU path where Python has no POSIX modules, as on Windows.

Shown: `prepare`, `train`, `eval`, `sample` and `list` in an interpreter that cannot import them, cannot
open a folder, and has no default encoding for text. Not shown, as it takes Windows itself: its lock
against another process, a rename while another program has the file open, its console and its drive
letters.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storylab import files
from storylab.errors import UserError
from storylab.locks import exclusive, held, lock_file
from storylab.record.index import run_folders

# filelock and psutil have a version for each system. They are loaded before the modules are hidden,
# and replace their versions on Windows. torch and the standard library find the modules missing.
WITHOUT_POSIX = """
import os, signal, sys, warnings
import filelock, psutil
HIDDEN = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "syslog"}
for name in HIDDEN:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
for name in ("O_DIRECTORY", "mkfifo", "fork", "getuid", "geteuid", "getpgid", "killpg", "setsid",
             "sched_getaffinity", "getloadavg", "posix_fadvise"):
    vars(os).pop(name, None)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM"):
    vars(signal).pop(name, None)
real_open = os.open
def no_folders(path, flags, *args, **kwargs):
    if not isinstance(path, int) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return real_open(path, flags, *args, **kwargs)
os.open = no_folders
warnings.filterwarnings("error", category=EncodingWarning, module="storylab")
import storylab.files
storylab.files.FOLDERS_OPEN = False  # os.name == "nt"; the name itself decides what a Path is
from storylab.cli import main
sys.exit(main(sys.argv[1:]))
"""
TRAIN = """--preset nano --n_layer 1 --n_embd 64 --n_hidden 64 --dtype float32 --max_iters 4
  --batch_size 4 --gradient_accumulation_steps 1 --block_size 16 --eval_interval 2 --eval_iters 1
  --warmup_iters 1 --device cpu""".split()


def storylab(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "warn_default_encoding", "-c", WITHOUT_POSIX, *args]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)


@pytest.mark.slow
def test_a_model_is_trained_without_posix_modules(tmp_path: Path) -> None:
    for args in (
        "prepare --source builtin --builtin_stories 200 --tokenizer bpe:300 --out data",
        f"train {' '.join(TRAIN)} --data_dir data --out_dir runs/a",
        "eval runs/a --device cpu",
        "sample runs/a --max_new_tokens 5 --device cpu",
        "list",
    ):
        result = storylab(tmp_path, *args.split())
        assert result.returncode == 0, result.stderr
    assert "finished" in result.stdout
    left = {path.name for path in tmp_path.rglob("*")}
    assert not [name for name in left if name.endswith(".lock")]
    for text in (tmp_path / "runs/a").glob("*.json*"):
        assert b"\r" not in text.read_bytes()


@pytest.mark.posix
def test_a_lock_file_replaces_the_lock_of_a_folder_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on Windows, which opens no folders.
    monkeypatch.setattr(files, "FOLDERS_OPEN", False)
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    assert not held(folder)
    with exclusive(folder):
        assert run_folders(tmp_path) == []
        assert lock_file(folder) == tmp_path / ".run.lock" and lock_file(folder).exists()
        for name in (folder, tmp_path / "link"):
            assert held(name)
            with pytest.raises(UserError, match="another process is at work"), exclusive(name):
                pass
        folder.rename(tmp_path / "moved")  # as a data set is when it is whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "moved"]
    assert not held(tmp_path / "moved")
