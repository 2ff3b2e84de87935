"""Counts the changes that a command makes to files below a folder, and does a fault at one of them.

A change is a file that is opened to be written, a write to it, a rename, a removal, a new folder, a link,
or a sync. Writes of libraries count as one, where the file is whole. A power cut is a kill after which
changes that no sync has made last are taken back.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fork_server import Fault

NEEDS_ROOM = ("open", "write", "mkdir", "link", "sync")
BLOCK = 4096


def watch(place: Path, notes: Path, fault: Fault) -> None:
    """Watch this process's changes below ``place`` from now on; ``notes`` gets the list of them."""
    _Watch(place, notes, fault).begin()


class _Watch:
    def __init__(self, place: Path, notes: Path, fault: Fault) -> None:
        self.place, self.fault, self.count, self.busy = f"{place}{os.sep}", fault, 0, False
        self.list = os.open(notes / "changes", os.O_WRONLY | os.O_APPEND)
        self.unsynced = _Unsynced(notes / "kept", fault) if fault.power_cut else None

    def begin(self) -> None:
        real_open, real_fsync = io.open, os.fsync

        def opened(file: Any, mode: str = "r", *args: Any, **named: Any) -> Any:
            stream = real_open(file, mode, *args, **named)
            writes = set(mode) & set("wax+") and isinstance(file, str | os.PathLike)
            return _Written(stream, self) if writes and self._inside(file) else stream

        def synced(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self.change("sync", path)
            real_fsync(descriptor)
            if self.unsynced:
                self.unsynced.synced(path)

        io.open = builtins.open = opened  # type: ignore[assignment]
        os.fsync = synced
        _watch_safetensors(self)
        sys.addaudithook(self._audit)

    def _inside(self, path: Any) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(self.place)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Hear of a change before it is made; an error from here is the system's to the caller."""
        if self.busy or event not in KINDS:
            return
        path = args[1] if event in ("os.rename", "os.link") else args[0]
        if not isinstance(path, str | bytes | os.PathLike) or not self._inside(path):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        name = os.path.abspath(os.fsdecode(path))
        self.change(KINDS[event], name)
        if self.unsynced:
            self.busy = True
            source = os.path.abspath(os.fsdecode(args[0]))
            self.unsynced.note(KINDS[event], source, name)
            self.busy = False

    def change(self, kind: str, path: str, half: Callable[[], None] = lambda: None) -> None:
        """A change is about to be made; ``half`` does a part of it."""
        if self.busy or not path.startswith(self.place):
            return
        fault = self.fault
        self.count += 1
        os.write(self.list, f"{kind} {os.path.relpath(path, self.place)}\n".encode())
        if fault.delay:
            time.sleep(fault.delay)
        if self.count == fault.term_at:
            signal.raise_signal(signal.SIGTERM)
        if self.count == fault.clock_back_at:
            _set_clock_back()
        if self.count == fault.remove_at:
            self.busy = True
            shutil.rmtree(fault.remove)
            self.busy = False
        if self.count in (fault.kill_at, fault.power_cut):
            self.busy = True
            half()
            if self.unsynced:
                self.unsynced.lose()
            os.killpg(0, signal.SIGKILL)
        # A full disk still lets go of files.
        fails = fault.error != errno.ENOSPC or kind in NEEDS_ROOM
        if fails and fault.fail_from and self.count >= fault.fail_from:
            raise OSError(fault.error, os.strerror(fault.error), path)


KINDS = {
    "open": "open",
    "os.rename": "rename",
    "os.remove": "remove",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
    "os.link": "link",
    "os.truncate": "truncate",
}


class _Written:
    """A file to write to, whose writes are changes; the rest is the file's own."""

    def __init__(self, stream: Any, watch: _Watch) -> None:
        self._stream, self._watch = stream, watch

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._stream.write(data[: len(data) // 2])
            self._stream.flush()

        name = self._stream.name
        self._watch.change("write", os.path.abspath(os.fsdecode(name)), half)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __iter__(self) -> Any:
        return iter(self._stream)


def _watch_safetensors(watch: _Watch) -> None:
    """The library writes by itself, so a half-written file is made of a whole one."""
    from storylab.record import checkpoint

    save = checkpoint.save_file

    def saved(tensors: Any, path: Any, *args: Any) -> None:
        def half() -> None:
            save(tensors, path, *args)
            os.truncate(path, os.path.getsize(path) // 2)

        watch.change("write", os.path.abspath(path), half)
        save(tensors, path, *args)
        if watch.unsynced:
            watch.unsynced.note("open", str(path), os.path.abspath(path))

    checkpoint.save_file = saved


def _set_clock_back() -> None:
    """Let the clock of the day go back by a day, as when it is corrected."""
    now, monotonic = time.time, time.strftime
    time.time = lambda: now() - 86_400.0
    time.strftime = lambda form, at=None: monotonic(form, at or time.localtime(time.time()))  # type: ignore[assignment,misc]


class _Unsynced:
    """The changes that no sync has made last yet, and how to take them back.

    A file's bytes last once it is synced; its name, a rename or a removal once its folder is.
    """

    def __init__(self, kept: Path, fault: Fault) -> None:
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        self.kept, self.draw, self.number = kept, random.Random(fault.seed), 0
        self.loses_all = fault.loses_all
        self.names: list[tuple[str, Callable[[], None]]] = []  # by folder
        self.bytes: dict[str, int] = {}  # how many of a file's first bytes last

    def synced(self, path: str) -> None:
        self.bytes.pop(path, None)
        self.names = [(folder, undo) for folder, undo in self.names if folder != path]

    def note(self, kind: str, source: str, path: str) -> None:
        """A change is about to be made."""
        if kind == "open":
            lasting = os.path.getsize(path) if os.path.exists(path) else 0
            self.bytes.setdefault(path, lasting)
            if not os.path.exists(path):
                self._add(path, lambda: _remove(path))
        elif kind == "rename" and os.path.isfile(source):
            earlier, new = self._keep(path), self._keep(source)
            if source in self.bytes:
                self.bytes[path] = self.bytes.pop(source)
            self._add(path, lambda: (_restore(earlier, path), _restore(new, source)))  # type: ignore[func-returns-value]
        elif kind == "link":
            self._add(path, lambda: _remove(path))
        elif kind == "remove":
            earlier = self._keep(path)
            self.bytes.pop(path, None)
            self._add(path, lambda: _restore(earlier, path))

    def _add(self, path: str, undo: Callable[[], Any]) -> None:
        self.names.append((os.path.dirname(path), undo))

    def _keep(self, path: str) -> str | None:
        """A copy of a file; None if there is none."""
        if not os.path.isfile(path):
            return None
        self.number += 1
        copy = self.kept / str(self.number)
        shutil.copyfile(path, copy)
        return str(copy)

    def lose(self) -> None:
        """Take back some of the changes: bytes past the last whole block, and the last names."""
        for path, lasting in self.bytes.items():
            if os.path.isfile(path) and self.draw.random() < 0.7:
                size = os.path.getsize(path)
                whole = max(
                    lasting, self.draw.randint(lasting, max(size, lasting)) // BLOCK * BLOCK
                )
                if self.draw.random() < 0.5:
                    os.truncate(path, min(whole, size))
                elif size > whole:
                    with io.open(path, "rb+") as file:  # noqa: UP020 - builtins.open is watched, too
                        file.seek(whole)
                        file.write(bytes(size - whole))
        # A journal keeps the order of names: it loses the last ones.
        kept = 0 if self.loses_all else self.draw.randint(0, len(self.names))
        for _, undo in reversed(self.names[kept:]):
            undo()


def _restore(copy: str | None, path: str) -> None:
    if copy is None:
        _remove(path)
    else:
        shutil.copyfile(copy, path)


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.remove(path)
