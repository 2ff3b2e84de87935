"""Flags of the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from storylab.config import (
    TrainConfig,
)
from storylab.errors import UserError
from storylab.flags import parse

REMOVED = {"cautious_decay": (False, True), "short_share": (0.0, 0.33)}
REMOVED_OF_THE_MODEL = {
    "zero_init": (False, True),
    "softcap": (0.0, 15.0),
    "embedding_norm": (False, True),
    "bigram_rows": (0, 4096),
    "value_residual": ("none", "token_table"),
}


@pytest.mark.parametrize("name", [*REMOVED, "softcap", "zero_init"])
def test_a_removed_flag_says_where_it_went(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name}.*; commit e30b07b is the last that had it"):
        parse(TrainConfig, [f"--{name}=1"], "storylab train")


def test_flags_are_parsed_before_torch_is_imported() -> None:
    """The module of every verb is imported, as for --help."""
    script = "import sys; from storylab.cli.registry import all_verbs; all_verbs(); "
    script += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
