"""Changes to the bytes of a file, most of which leave it a file of its form: JSON, TOML, safetensors."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from storylab.data.dataset import fingerprint

Change = Callable[[bytes, random.Random], bytes]
# What a value may be replaced with.
ODD_VALUES: Sequence[Any] = (
    *(None, True, False, "", "text", "1", "..", "../..", "/etc/passwd", "a/b", "\x1b[2J", "<b>|`*"),
    *("\0", "\ud800", -1, 0, 1, 2, 1.5, -0.0, 10**30, -(2**63), 1e39, 5e-324, [], [1], [[]], {}),
)  # fmt: skip
TOML_VALUES = (
    *(
        "nan",
        "-inf",
        "[]",
        "{}",
        "''",
        "1e400",
        "0",
        "-1",
        "10" * 200,
        '"a/b"',
        "[[1]]",
        "1979-05-27",
    ),
)


def change_bytes(data: bytes, draw: random.Random) -> bytes:
    """Change, add, remove or repeat a few bytes."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed) + 1)
        length = min(draw.choice((1, 1, 1, 2, 4, 8, 100)), len(changed) - at)
        match draw.randrange(5):
            case 0 | 1 if at < len(changed):
                changed[at] = draw.choice(
                    (draw.randrange(256), changed[at] ^ 1 << draw.randrange(8), 0, 255)
                )
            case 2:
                changed[at:at] = draw.randbytes(draw.choice((1, 2, 8)))
            case 3:
                del changed[at : at + length]
            case _:
                changed[at:at] = changed[at : at + length] * draw.choice((1, 1, 3))
    return bytes(changed)


def change_json(data: bytes, draw: random.Random) -> bytes:
    """Replace, remove or move a value of a JSON file, or of one of its lines."""
    lines = data.splitlines() if b"\n{" in data else [data]
    number = draw.randrange(len(lines) or 1)
    try:
        value = json.loads(lines[number])
    except (ValueError, IndexError, RecursionError):
        return change_bytes(data, draw)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        value = changed_value(value, draw)
    lines[number] = json.dumps(value, ensure_ascii=draw.random() < 0.9).encode("utf-8", "replace")
    if len(lines) > 1 and draw.random() < 0.1:
        lines.insert(draw.randrange(len(lines)), lines[number])
    return b"\n".join(lines)


def changed_value(value: Any, draw: random.Random) -> Any:
    """``value`` with a part of it changed."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.05:
        if type(value) in (int, float) and draw.random() < 0.5:
            return value + draw.choice((-1, 1)) if draw.random() < 0.7 else value * 1e6
        return draw.choice(ODD_VALUES)
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    changed: Any = dict(value) if isinstance(value, dict) else list(value)
    chance = draw.random()
    if chance < 0.1:
        del changed[key]
    elif chance < 0.2 and isinstance(changed, list):
        changed.append(changed[key])
    elif chance < 0.2:
        changed[draw.choice(("", "../x", "text", "\x1b", *changed))] = changed[key]
    else:
        changed[key] = changed_value(changed[key], draw)
    return changed


def change_manifest(data: bytes, draw: random.Random) -> bytes:
    """As :func:`change_json`, with the fingerprint that belongs to the change."""
    changed = change_json(data, draw)
    try:
        values = json.loads(changed)
        values["fingerprint"] = fingerprint(values)
        return json.dumps(values).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return changed


def change_toml(data: bytes, draw: random.Random) -> bytes:
    """Change the value, the key or the place of a line of a TOML file, or any bytes."""
    lines = data.decode("utf-8", "replace").splitlines()
    if not lines or draw.random() < 0.3:
        return change_bytes(data, draw)
    at = draw.randrange(len(lines))
    key, equals, _ = lines[at].partition("=")
    if equals and draw.random() < 0.7:
        lines[at] = (
            f"{key}= {draw.choice((*TOML_VALUES, lines[draw.randrange(len(lines))].partition('=')[2]))}"
        )
    elif draw.random() < 0.5:
        lines.insert(draw.randrange(len(lines)), lines.pop(at))
    else:
        lines.insert(at, lines[draw.randrange(len(lines))])
    return "\n".join(lines).encode()


def change_checkpoint(data: bytes, draw: random.Random) -> bytes:
    """Change a value in the header of a safetensors file, or any bytes."""
    size = int.from_bytes(data[:8], "little")
    if draw.random() < 0.3 or size > len(data) - 8:
        return change_bytes(data, draw)
    header = change_json(data[8 : 8 + size], draw)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
