"""The request for a data set, of which the flags of ``storylab prepare`` are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class PrepareConfig:
    """Turn stories into a data set to train on.

    Examples: storylab prepare | storylab prepare --source builtin --tokenizer bpe:1024
    | storylab prepare --train a.parquet b.txt --validation c.txt --out data/mine
    """

    source: Literal["tinystories", "tinystories-v2", "tinystories-gpt4-clean", "builtin"] = (
        "tinystories"
    )
    """A data set of the Hugging Face hub, or the built-in corpus; not used with --train."""
    train: tuple[Path, ...] = ()
    """Local training stories: .txt (<|endoftext|> between stories), .parquet, .jsonl, also .gz, .zst."""
    validation: tuple[Path, ...] = ()
    """Local validation stories."""
    test: tuple[Path, ...] = ()
    """Local test stories; by default half of the validation stories, by a hash of their text."""
    tokenizer: str = "gpt2"
    """gpt2 (50,257 ids), or bpe:N to train N ids on the training stories (bpe:4096 suits small models)."""
    tokenizer_dir: Path | None = None
    """Folder with GPT-2's vocab.bpe and encoder.json; by default the installed copy."""
    out: Path | None = None
    """Folder to write; by default data/SOURCE-TOKENIZER."""
    keep_overlap: bool = False
    """Keep training stories that also are validation or test stories (they are left out otherwise)."""
    builtin_stories: int = 20_000
    """How many stories the built-in corpus has."""
    builtin_seed: int = 0
    """Seed of the built-in corpus."""

    @property
    def folder(self) -> Path:
        """Where the data set goes."""
        name = "files" if self.train else self.source
        return self.out or Path("data") / f"{name}-{self.tokenizer.replace(':', '')}"
