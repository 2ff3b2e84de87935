"""The course of a run, read from a metrics file that may be growing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from storylab.files import open_file
from storylab.record.folder import parse_row
from storylab.record.schema import EvaluationRow, IterationRow
from storylab.ui.views import Curve

# A screen has fewer columns than this.
MOST_POINTS = 1500


class Course:
    """The rows of a metrics file. Every byte is read once, unless a resumed run replaces the file.

    Args:
        path: the metrics file of a run; it may be missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self._file_number, self._offset, self._lines = 0, 0, 0
        self.rows: list[IterationRow] = []
        self.evaluations: list[EvaluationRow] = []

    def update(self) -> None:
        """Read what was added since the last call.

        Raises:
            UserError: a row is damaged, or the file cannot be read.
        """
        try:
            known = self.path.stat()
        except FileNotFoundError:
            self._begin()
            return
        if known.st_ino != self._file_number or known.st_size < self._offset:
            self._begin()
        if known.st_size == self._offset:
            return
        with open_file(self.path) as file:
            self._file_number = os.fstat(file.fileno()).st_ino
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # the last row may be half written
        self._offset += len(whole)
        for line in whole.splitlines():
            self._lines += 1
            row = parse_row(line, f"{self.path} line {self._lines}")
            if isinstance(row, IterationRow):
                self.rows.append(row)
            elif isinstance(row, EvaluationRow):
                self.evaluations.append(row)

    @property
    def last(self) -> IterationRow | None:
        """The last iteration so far."""
        return self.rows[-1] if self.rows else None

    def curve(self, name: str) -> Curve:
        """At most ``MOST_POINTS`` points, each the mean of as many iterations."""
        step = max(1, -(-len(self.rows) // MOST_POINTS))
        parts = [self.rows[i : i + step] for i in range(0, len(self.rows), step)]
        evaluations = [row for row in self.evaluations if row.iteration > 0]
        kept = evaluations[:: max(1, -(-len(evaluations) // MOST_POINTS))]
        if evaluations and kept[-1] is not evaluations[-1]:
            kept.append(evaluations[-1])
        return Curve(
            name=name,
            iterations=[part[-1].iteration for part in parts],
            losses=[_mean_loss(part) for part in parts],
            speeds=[len(part) / sum(1 / row.tokens_per_second for row in part) for part in parts],
            learning_rates=[part[-1].learning_rate for part in parts],
            evaluated=[row.iteration for row in kept],
            validation_losses=[row.val_loss for row in kept],
            tokens_per_iteration=self.rows[0].tokens // (self.rows[0].iteration + 1)
            if self.rows
            else 0,
        )


def _mean_loss(rows: Sequence[IterationRow]) -> float | None:
    """Mean training loss of iterations, without those that were skipped; None if all were."""
    losses = [row.loss for row in rows if row.loss is not None]
    return sum(losses) / len(losses) if losses else None
