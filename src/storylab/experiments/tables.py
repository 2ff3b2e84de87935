"""Read values from the tables of a TOML file, with errors that name the key."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from storylab.config import current_name
from storylab.decode import shown
from storylab.errors import UserError

KINDS: dict[type, str] = {str: "text", list: "a list [...]", dict: "a table {...}"}
# Keys of [data] that hold lists.
LISTS = ("train", "validation", "test")


def respelled(table: dict[str, Any], place: str = "the file") -> dict[str, Any]:
    """Replace hyphens by underscores in the keys of a file, or of one of its scales, as flags may
    have both, and former names of config fields by the current ones. Names that the user chose stay.

    Raises:
        UserError: a key is given in both spellings.
    """
    table = _one_spelling(table, place)
    if "data" in table:
        table["data"] = _one_spelling(table["data"], "[data]")
    if "config" in table:
        table["config"] = _current_fields(table["config"], "[config]")
    for key, kind in (("arms", "arm"), ("conditions", "condition")):
        if isinstance(table.get(key), dict):
            table[key] = {
                name: _current_fields(values, f"{kind} '{name}'")
                for name, values in table[key].items()
            }
    if isinstance(table.get("factors"), dict):
        table["factors"] = {
            name: {
                level: _current_fields(changes, f"factor '{name}', level '{level}'")
                for level, changes in levels.items()
            }
            if isinstance(levels, dict)
            else levels
            for name, levels in table["factors"].items()
        }
    if isinstance(table.get("expect"), list):
        table["expect"] = [_one_spelling(entry, "[[expect]]") for entry in table["expect"]]
    if isinstance(table.get("scales"), dict):
        table["scales"] = {
            name: respelled(values, f"scale '{name}'") if isinstance(values, dict) else values
            for name, values in table["scales"].items()
        }
    return table


def _current_fields(table: Any, place: str) -> Any:
    """Spell the keys of a table of config fields with underscores and by their current names."""
    return _one_spelling(table, place, current_name)


def _one_spelling(table: Any, place: str, rename: Callable[[str], str] = str) -> Any:
    """Spell the keys of a table with underscores and as ``rename`` has them. Other values stay: the
    code that reads them reports the fault."""
    if not isinstance(table, dict):
        return table
    spelled: dict[str, Any] = {}
    given: dict[str, str] = {}
    for key, value in table.items():
        name = rename(key.replace("-", "_"))
        if name in given:
            raise UserError(f"{name} is given twice in {place}, as {given[name]} and as {key}")
        given[name], spelled[name] = key, value
    return spelled


def is_number(value: Any) -> bool:
    """Whether a value of a file is a number that a float holds."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Turn a table into flags, so that one parser checks files and the command line.

    Raises:
        UserError: a value has a type that no flag has.
    """
    flags = []
    for key, value in values.items():
        many = key in LISTS and isinstance(value, list)
        for entry in value if many else [value]:
            if not isinstance(entry, str if many else bool | str | int | float):
                kind = "a list of texts" if many else "a single value"
                raise UserError(f"{key} must be {kind}, not {shown(value)}")
            if isinstance(entry, str) and ("\0" in entry or (many and entry.startswith("-"))):
                raise UserError(f"{key} cannot be {shown(entry)}")
        # With "=" a value that looks like a flag is not taken for one.
        flags += [f"--{key}", *value] if many else [f"--{key}={value}"]
    return flags


def require_known(table: Mapping[str, Any], keys: set[str], place: str) -> None:
    """Raise a UserError that names ``place`` if a table has another key than ``keys``."""
    for key in table:
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1)
            hint = f"perhaps you meant '{close[0]}'" if close else f"use {listed(keys)}"
            raise UserError(f"unknown key '{key}' in {place}: {hint}")


def get_typed(table: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """Return the value of a key, or ``default``.

    Raises:
        UserError: it is not of type ``kind``.
    """
    value = table.get(key, default)
    if not isinstance(value, kind):
        raise UserError(f"{key} must be {KINDS[kind]}, not {shown(value)}")
    return value


def get_table(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the table of a key, empty if there is none; a UserError if it is something else."""
    value: dict[str, Any] = get_typed(table, key, dict, {})
    return value


def get_tables(table: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Return the table of a key whose values are tables; a UserError if it is something else."""
    value = get_table(table, key)
    for name in value:
        get_table(value, name)
    return value


def listed(names: Iterable[str]) -> str:
    """Join names for a message, those of a set in alphabetical order."""
    return ", ".join(sorted(names) if isinstance(names, set | frozenset) else names)
