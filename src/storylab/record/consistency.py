"""Whether the files of a run fit together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from storylab.record.folder import METRICS, POSITION_LOSSES, STORY_LOSSES, TEST_LOSSES
from storylab.record.schema import SplitLoss

if TYPE_CHECKING:
    import numpy as np

    from storylab.record.run import Run


def contradictions(run: Run) -> Iterator[str]:
    """Contradictions between the files of a run."""
    for number, row in enumerate(run.iterations):
        if row.iteration != number:
            yield f"{METRICS} has iteration {row.iteration} where {number} should be"
    if not run.finished:
        return
    expected = run.results.iterations
    if len(run.iterations) != expected:
        yield f"{METRICS} has {len(run.iterations)} of its {expected} iterations"
    validation, test = run.validation, run.results.test
    if not _fit(run.story_losses, validation):
        yield f"{STORY_LOSSES} is not that of its summary"
    if test is not None and not _fit(run.test_losses, test):
        yield f"{TEST_LOSSES} is not that of its summary"
    # Runs from before windows were recorded may have no losses by position either.
    positions, known = len(run.position_losses), validation.block_size
    if positions != known and (known is not None or positions):
        yield f"{POSITION_LOSSES} has {positions} positions of {known}"


def _fit(stories: np.ndarray, split: SplitLoss) -> bool:
    """Whether losses by story ``[stories, 2]`` give the loss of their split."""
    if stories.shape != (split.stories, 2) or not (stories[:, 1] > 0).all():
        return False
    loss = float(stories[:, 0].sum() / stories[:, 1].sum())
    return math.isclose(loss, split.loss, rel_tol=1e-9)
