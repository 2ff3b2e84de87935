"""Remarks that people write into EXPERIMENTS.md, kept when it is made again."""

from __future__ import annotations

import re

from storylab.errors import UserError

BEGIN_REMARKS, END_REMARKS = "<!-- remarks: {} -->", "<!-- end of remarks -->"
REMARKS_HINT = "*Write remarks here; they stay when this file is made again.*"


def read_remarks(text: str) -> dict[str, str]:
    """Hand-written remarks of an earlier log, by experiment.

    Raises:
        UserError: some are not between their markers, and would be lost.
    """
    pattern = re.escape(BEGIN_REMARKS).replace(re.escape("{}"), "(.*?)")
    # No marker within: one that lost its end must not swallow the sections after it.
    body = r"((?:(?!<!-- (?:remarks:|end of remarks)).*\n)*?)"
    found = re.findall(f"{pattern}\n{body}{re.escape(END_REMARKS)}", text)
    begun = [
        (number, match[1])
        for number, line in enumerate(text.splitlines(), start=1)
        if (match := re.fullmatch(pattern, line.strip()))
    ]
    whole = [label for label, _ in found]
    for number, label in begun:
        if [name for _, name in begun].count(label) != whole.count(label):
            raise UserError(
                f"line {number}: the remarks on {label} are not between a line "
                f"{BEGIN_REMARKS.format(label)} and a line {END_REMARKS}: correct that, or they are lost"
            )
    remarks = {label: body.strip("\n") for label, body in found}
    return {k: v for k, v in remarks.items() if v.strip() and v.strip() != REMARKS_HINT}
