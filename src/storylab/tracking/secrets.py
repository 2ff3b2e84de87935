"""Removes secrets from messages: libraries put keys into their errors, which our log would keep."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
_SECRET_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
# Shorter values are words and numbers that a message may have for other reasons.
_SHORTEST = 6
# user:password@ in an address; the keys of Hugging Face and W&B; 40 hexadecimal digits, as older keys have.
_SHAPES = re.compile(
    r"(?<=://)[^/\s@]+(?=@)|\bhf_\w{8,}|\bwandb_v\d_\w+|\b[0-9a-f]{40}\b|(?<=token=)[^&\s]+"
)


def without_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """``text`` with keys, tokens and passwords replaced by ``***``.

    Args:
        text: a message.
        environment: whose secrets to look for; by default this process's.
    """
    environment = os.environ if environment is None else environment
    # The longest first, as one may be part of another.
    for name, value in sorted(environment.items(), key=lambda item: -len(item[1])):
        if _SECRET_NAMES.search(name) and len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    return _SHAPES.sub(HIDDEN, text)
