"""Guess what separates the stories of a text without ``<|endoftext|>``."""

from __future__ import annotations

import re
from collections import Counter

from storylab.data.tally import plural

SEARCHED = 1_000_000
# Separators of stories in other corpora: a marker in brackets, or a line without a letter.
_MARKER = re.compile(r"[<\uff1c\[{][^<>\uff1c\uff1e\[\]{}\n]{1,30}[>\uff1e\]}]")
_MARKER_NAME = re.compile(r"(?<![a-z])(?:end|eo[stfd]|sep|doc|bos)|^.\s*/?s\s*.$", re.IGNORECASE)
_RULE = re.compile(r"^[^\S\n]*((?:[^\w\s][^\S\n]*){1,80})$", re.MULTILINE)
_BLANK = re.compile(r"\n[^\S\n]*(?=\n)")


def other_separator(text: str) -> str:
    """Name a marker, besides ``<|endoftext|>``, that may separate stories, and count it."""
    if len(text) > SEARCHED:
        return f"{other_separator(text[:SEARCHED])} in its first {SEARCHED:,} characters"
    markers = Counter(m for m in _MARKER.findall(text) if _MARKER_NAME.search(m))
    rules = Counter(match.strip() for match in _RULE.findall(text))
    for found in (markers, rules):
        if found:
            what, count = found.most_common(1)[0]
            return f"'{what}' {count:,} times" if count > 1 else f"'{what}' once"
    text = text.strip().replace("\r\n", "\n")
    blank = len(_BLANK.findall(text))
    return plural(blank, "blank line") if blank else plural(len(text.splitlines()), "line")
