"""GPT-2's tokenizer in another library, for tests."""

from __future__ import annotations

from typing import Any


def hugging_face_gpt2() -> Any:
    """GPT-2's tokenizer in the `tokenizers` library, from the same two files."""
    from tokenizers import Tokenizer as Other
    from tokenizers import models, pre_tokenizers

    # No public function gives the two files, which both libraries must read.
    from storylab.data.tokenizer import _gpt2_file

    paths = [str(_gpt2_file(name, None)) for name in ("encoder.json", "vocab.bpe")]
    other = Other(models.BPE.from_file(*paths))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return other
