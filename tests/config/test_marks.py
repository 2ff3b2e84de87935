"""Every field of a config has marks and is used."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Annotated

import pytest

from storylab import config as configs
from storylab.config import (
    ModelConfig,
    TrainConfig,
)
from storylab.config.marks import mark, marks_of

SOURCE = Path(configs.__file__).parents[1]


def test_a_field_without_marks_is_an_error() -> None:
    @dataclasses.dataclass
    class Forgetful:
        known: Annotated[int, mark("size")] = 1
        forgotten: int = 2

    # Annotations are text here, and names of a function's are not found from its text.
    Forgetful.__annotations__ = {"known": Annotated[int, mark("size")], "forgotten": int}
    with pytest.raises(TypeError, match=r"Forgetful\.forgotten has no mark"):
        marks_of(Forgetful)


def test_every_field_is_read_somewhere() -> None:
    """As an attribute of something called a config, a model or, in config.py, self."""
    read: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        owners = {"config", "model", "preset", "stored", "wanted"}
        owners |= {"self"} if path.parent.name == "config" else set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = getattr(owner, "attr", getattr(owner, "id", None))
                if name in owners:
                    read.add(node.attr)
    for kind in (TrainConfig, ModelConfig):
        fields = {f.name for f in dataclasses.fields(kind)}
        assert fields <= read, fields - read
