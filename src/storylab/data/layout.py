"""Names of splits and markers. Imports nothing, so that opening a data set loads little."""

from __future__ import annotations

END_OF_TEXT = "<|endoftext|>"  # separates stories in .txt files; one token after every story
TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
READ_IN_TRAINING = (TRAIN, VALIDATION)
TOKENIZER_FILE = "tokenizer.tiktoken"
