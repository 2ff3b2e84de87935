"""Runs at a glance, for `storylab list`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from storylab.record.index import RunEntry

if TYPE_CHECKING:
    from storylab.documents.list import ListedRun

LIST_COLUMNS = ("run", "state", "parameters ", "tokens ", "val loss ", "tok/s ", "GB ", "started")


def list_cells(entry: RunEntry) -> tuple[str, ...]:
    """A run as a row of text, in the columns of ``LIST_COLUMNS``."""
    return (
        entry.name,
        entry.state,
        "" if entry.parameters is None else f"{entry.parameters:,}",
        "" if entry.tokens is None else f"{entry.tokens:,}",
        "" if entry.loss is None else f"{entry.loss:.4f}",
        "" if entry.speed is None else f"{entry.speed:,.0f}",
        "" if entry.memory is None else f"{entry.memory / 1e9:.2f}",
        entry.started[:16].replace("T", " "),
    )


def listed(entry: RunEntry) -> ListedRun:
    """A run as an object of a document."""
    from storylab.documents.list import ListedRun

    return ListedRun(
        name=entry.name,
        state=entry.state,
        parameters=entry.parameters,
        tokens=entry.tokens,
        validation_loss_nats_per_token=entry.loss,
        tokens_per_second=entry.speed,
        peak_memory_bytes=entry.memory,
        started=entry.started or None,
        fault=entry.fault or None,
    )
