"""``manifest.json`` of a data set as types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from storylab.decode import LARGEST_INT

Count = Annotated[int, Meta(ge=0, le=LARGEST_INT)]
Size = Annotated[int, Meta(ge=1, le=LARGEST_INT)]
FileName = Annotated[str, Meta(pattern=r"\A\w[\w.-]*\Z", max_length=200)]
"""A file in the folder of the data set: nothing that leads elsewhere."""


class TokenizerInfo(Struct, frozen=True, kw_only=True):
    """The tokenizer of a data set."""

    name: str
    sha256: str
    vocab_size: Size
    end_of_text: Count


class ShardInfo(Struct, frozen=True, kw_only=True):
    """A file of token ids."""

    file: FileName
    tokens: Size
    sha256: str


class SplitInfo(Struct, frozen=True, kw_only=True):
    """A split of a data set."""

    stories: Count
    tokens: Count
    text_bytes: Count
    shards: list[ShardInfo]
    stories_file: FileName
    stories_sha256: str
    duplicate_stories: Count


class SplitInfos(Struct, frozen=True, kw_only=True):
    """The splits; data sets of earlier versions, and those with very few stories, have no test split."""

    train: SplitInfo
    validation: SplitInfo
    test: SplitInfo | UnsetType = UNSET


class OverlapInfo(Struct, frozen=True, kw_only=True):
    """Stories of a split that are also in one that is held out from it."""

    train_stories_in_validation: Count
    train_stories_in_test: Count = 0
    validation_stories_in_test: Count = 0
    left_out: bool


class Manifest(Struct, frozen=True, kw_only=True):
    """``manifest.json`` of a data set."""

    format: int
    request: Any
    tokenizer: TokenizerInfo
    dtype: Literal["uint16", "uint32"]
    splits: SplitInfos
    overlap: OverlapInfo
    test_origin: Literal["hash", "files", "none"] | UnsetType = UNSET
    """Where the test split comes from: the validation stories, cut by hash; files of its own; or there is
    none, as the validation stories are too few. Earlier versions did not record it."""
    fingerprint: str
