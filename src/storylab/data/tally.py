"""Counts of changes and omissions while reading a split, for the manifest and the summary."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from storylab.files import shown

# Names in a manifest and in a line, so that a folder of thousands of pictures fits both.
NAMES_KEPT, NAMES_SHOWN = 100, 3


@dataclass
class Tally:
    """Changes and omissions while reading a split, counted as its stories stream by.

    Attributes:
        line_ends: CR LF and lone CR, each made one LF.
        byte_order_marks: U+FEFF, removed.
        null_rows, blank_rows: rows without text, left out.
        markers: stories that hold ``<|endoftext|>`` as ordinary text.
        skipped: how many entries of folders were not read, and ``skipped_names``, the first of them.
        unseparated: how many .txt files are one story, without ``<|endoftext|>`` inside, and
            ``unseparated_files``, the first of them, each with another marker that may separate its
            stories.
    """

    line_ends: int = 0
    byte_order_marks: int = 0
    null_rows: int = 0
    blank_rows: int = 0
    markers: int = 0
    skipped: int = 0
    skipped_names: list[str] = field(default_factory=list)
    unseparated: int = 0
    unseparated_files: list[dict[str, str]] = field(default_factory=list)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Tally:
        """The tally in a manifest; counts of other versions are ignored."""
        names = [f.name for f in dataclasses.fields(Tally)]
        return Tally(**{name: values[name] for name in names if name in values})

    def skip(self, names: tuple[str, ...]) -> None:
        """Note entries of folders that are not read."""
        self.skipped += len(names)
        self.skipped_names = [*self.skipped_names, *names][:NAMES_KEPT]

    def note_unseparated(self, file: str, has: str) -> None:
        """Note a file that is one story, and the marker that it has in the place of ``<|endoftext|>``."""
        self.unseparated += 1
        if len(self.unseparated_files) < NAMES_KEPT:
            self.unseparated_files.append({"file": file, "has": has})

    def lines(self) -> list[str]:
        """A line for each kind of change or omission."""
        counted = [
            (self.line_ends, "line end", "of CR or CR LF made LF"),
            (self.byte_order_marks, "byte order mark", "removed"),
            (self.null_rows, "null row", "left out"),
            (self.blank_rows, "blank row", "left out"),
            (self.markers, "story", "with <|endoftext|> inside, kept as ordinary text"),
        ]
        found = [f"{plural(count, what)} {fate}" for count, what, fate in counted if count]
        if self.skipped:
            found.append(f"{plural(self.skipped, 'entry')} of folders not read ({self._names()})")
        for entry in self.unseparated_files[:NAMES_SHOWN]:
            found.append(
                f"{shown(entry['file'])} is one story, without <|endoftext|> inside (it has {entry['has']})"
            )
        more = self.unseparated - NAMES_SHOWN
        if more > 0:
            found.append(f"{plural(more, 'more file')} of one story each")
        return found

    def _names(self) -> str:
        names = ", ".join(shown(name) for name in self.skipped_names[:NAMES_SHOWN])
        return names + (", ..." if self.skipped > NAMES_SHOWN else "")


def plural(count: int, noun: str) -> str:
    """``1 entry``, ``2,000 entries``."""
    many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else many}"
