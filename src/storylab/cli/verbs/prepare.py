"""``storylab prepare``."""

from __future__ import annotations

from storylab.cli.registry import MORE_MEMORY, Call, Verb
from storylab.data.prepare_config import PrepareConfig


def run(call: Call) -> int:
    """Prepare a data set."""
    config = call.parse(PrepareConfig)
    from storylab.cli.datasets import prepare_and_describe

    prepare_and_describe(config)
    return 0


VERB = Verb(
    "prepare",
    "turn stories into a data set to train on",
    "runs",
    run,
    PrepareConfig,
    position=1,
    memory_remedy=MORE_MEMORY,
)
