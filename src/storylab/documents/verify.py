"""The document of ``storylab verify --json``."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from storylab.documents.fields import about


class DifferenceFound(Struct, frozen=True, kw_only=True):
    """Something that is not as it should be."""

    check: Annotated[str, about("name of the check that found it")]
    file: Annotated[
        str, about("the file, relative to the folder; empty if no one file is at fault")
    ]
    message: Annotated[str, about("the difference in words")]


class Unchecked(Struct, frozen=True, kw_only=True):
    """Something that could not be checked."""

    check: Annotated[str, about("name of the check")]
    reason: Annotated[str, about("what was not checked, and why")]


class VerifiedItem(Struct, frozen=True, kw_only=True):
    """A run, a data set or an experiment."""

    path: Annotated[str, about("the folder, or the record of an experiment")]
    kind: Annotated[str, about("`run`, `data set` or `experiment`")]
    checks: Annotated[list[str], about("names of the checks that were made")]
    differences: Annotated[list[DifferenceFound], about("all that the checks found")]
    unchecked: Annotated[list[Unchecked], about("all that could not be checked")]


class VerifyDocument(
    Struct, frozen=True, kw_only=True, tag_field="schema", tag="storylab.verify/1"
):
    """All findings of a verification; the exit code is 1 if there is a difference."""

    depth: Annotated[str, about("`record`, `files` or `weights`")]
    verified: Annotated[list[VerifiedItem], about("everything that was verified, in order")]
    differences: Annotated[int, about("number of all differences")]
