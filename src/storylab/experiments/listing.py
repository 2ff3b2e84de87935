"""Runs at a glance: what `storylab list` and `storylab watch` show."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from storylab.errors import UserError
from storylab.experiments.outcome import experiment_records
from storylab.experiments.results import ENDED, FAILURE, load_result, run_state
from storylab.files import held, read_json
from storylab.training.lines import duration
from storylab.training.run_folder import CONFIG, METRICS, SUMMARY, Run

WATCH_COLUMNS = ("run", "state", "iteration ", "loss ", "val loss ", "tok/s now ", "left ")
# Enough of the end of a metrics file to hold its last rows.
TAIL_BYTES = 16_384


@dataclass(frozen=True)
class ListRow:
    """One run folder; None for what is not known."""

    name: str
    state: str
    parameters: int | None
    tokens: int | None
    loss: float | None
    speed: float | None
    memory: int | None
    started: str

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        return (
            self.name,
            self.state,
            "" if self.parameters is None else f"{self.parameters:,}",
            "" if self.tokens is None else f"{self.tokens:,}",
            "" if self.loss is None else f"{self.loss:.4f}",
            "" if self.speed is None else f"{self.speed:,.0f}",
            "" if self.memory is None else f"{self.memory / 1e9:.2f}",
            self.started[:16].replace("T", " "),
        )


def list_rows(runs: Path) -> Iterator[ListRow]:
    """Every run folder in ``runs``, a damaged one with what can be read of it."""
    for folder in sorted(p for p in runs.iterdir() if p.is_dir()):
        if not any((folder / name).exists() for name in (CONFIG, SUMMARY, FAILURE)):
            continue
        yield _list_row(folder)


def _list_row(folder: Path) -> ListRow:
    state, _ = run_state(folder)
    try:
        if state in ENDED:
            result = load_result(folder)
            return ListRow(
                folder.name,
                state,
                result.summary.get("parameters"),
                result.summary.get("tokens"),
                result.loss if result.finished else None,
                result.speed,
                result.summary.get("peak_memory_bytes"),
                str(result.environment["started"]),
            )
        started = "" if state == "failed" else str(Run(folder).environment["started"])
        return ListRow(folder.name, state, None, None, None, None, None, started)
    except (UserError, KeyError, TypeError, AttributeError):
        return ListRow(folder.name, "damaged", None, None, None, None, None, "")


def watch_rows(runs: Path) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """For every experiment its title with how far it is, and a row for every run.

    Raises:
        UserError: there are no experiments.
    """
    records = experiment_records(runs)
    if not records:
        raise UserError(
            f"{runs} has no experiments yet: `storylab list --runs {runs}` shows its runs"
        )
    for path in records:
        with contextlib.suppress(UserError, KeyError, TypeError, AttributeError):
            record = read_json(path)
            rows = [
                _watch_row(
                    runs / name, f"{cell['arm']} {cell['condition']} s{seed}".replace("  ", " ")
                )
                for cell in record["cells"]
                for seed, name in cell["runs"].items()
            ]
            done = sum(row[1] not in ("waiting", "training", "stopped") for row in rows)
            yield f"{path.stem}: {record['title']}, {done} of {len(rows)} runs done", rows


def _watch_row(folder: Path, label: str) -> tuple[str, ...]:
    try:
        return _known_row(folder, label)
    except (UserError, KeyError, TypeError, AttributeError, OSError):
        return (label, "damaged", "", "", "", "", "")


def _known_row(folder: Path, label: str) -> tuple[str, ...]:
    state, _ = run_state(folder)
    if state == "new":
        return (label, "waiting", "", "", "", "", "")
    run = Run(folder)
    if state == "unfinished":
        state = "training" if held(folder) else "stopped"
    last, evaluation = _last_rows(folder / METRICS)
    if state == "failed" or not last:
        return (label, state, "", "", "", "", "")
    total = run.config.max_iters
    left = (total - last["iteration"]) * last["step_seconds"]
    summary = run.summary or {}
    full = summary.get("validation") or {}
    val_loss = full.get("loss", evaluation.get("val_loss"))
    return (
        label,
        state,
        f"{last['iteration']:,}/{total:,}",
        f"{last['loss']:.4f}",
        "" if val_loss is None else f"{val_loss:.4f}",
        f"{last['tokens_per_second']:,.0f}",
        duration(left) if state == "training" else "",
    )


def _last_rows(path: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The last whole iteration and evaluation rows of a metrics file that may be growing."""
    found: dict[str, dict[str, float]] = {"iteration": {}, "evaluation": {}}
    if path.exists():
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            for line in file.read().decode("utf-8", "replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    row = json.loads(line)
                    found[row["kind"]] = row
    return found["iteration"], found["evaluation"]
