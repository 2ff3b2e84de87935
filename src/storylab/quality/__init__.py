"""Quality beyond the loss: questions about held-out stories, and measures of written stories."""

from __future__ import annotations

from typing import Literal

# Names of the entries in storylab.quality.questions; here so that flags need neither numpy nor torch.
TaskName = Literal["last_word", "endings"]
MOST_SAMPLES = 1_000
