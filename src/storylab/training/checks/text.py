"""A batch decodes to text."""

from __future__ import annotations

from storylab.training.check import Check, Finding, Subject

# Bytes of a character that a window's border may cut off.
CUT = 3
# Characters of the text that the record keeps.
SHOWN = 60


def run(subject: Subject) -> Finding:
    """Decode the first windows of the next batch. Between their borders all bytes must be UTF-8."""
    tokenizer = subject.setup.dataset.tokenizer
    texts = []
    for window in subject.windows.tolist():
        data = tokenizer.decode_bytes(window)
        text = _text(data)
        if text is None:
            fault = (
                f"the first batch does not decode to text (it begins {data[:30]!r}): the ids are not those "
                "of the data set's tokenizer; prepare the data again"
            )
            return Finding("", fault)
        texts.append(text)
    return Finding(f"the first batch begins {texts[0][:SHOWN]!r}")


def _text(data: bytes) -> str | None:
    """``data`` as text, without parts of characters at its ends; None if it is not UTF-8."""
    first = next((n for n in range(min(CUT, len(data)) + 1) if not _continues(data, n)), 0)
    try:
        return data[first:].decode("utf-8")
    except UnicodeDecodeError as error:
        # A character that the end cuts off is whole up to there.
        cut = error.reason == "unexpected end of data" and error.end == len(data) - first
        return data[first : first + error.start].decode("utf-8") if cut else None


def _continues(data: bytes, place: int) -> bool:
    """Whether the byte at ``place`` continues a character."""
    return place < len(data) and data[place] & 0xC0 == 0x80


CHECK = Check("text", 20, run)
