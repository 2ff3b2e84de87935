"""Learn a byte-pair vocabulary from the training stories, by the ``tokenizers`` library."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING

from storylab.data.tokenizer import Tokenizer
from storylab.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Trainer

NO_STORIES = (
    "there are no training stories: the files have no text, or all of their stories are also in "
    "the validation files"
)
# Enough text for any vocabulary in use here; pairs counted on more would be the same ones.
TRAINING_BYTES = 200_000_000
# A longer word is split into pieces of this many bytes before its pairs are counted: the trainer's
# work grows with the square of a word. Words of ordinary text are far shorter.
TRAINING_WORD_BYTES = 256


def train_tokenizer(stories: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-pair vocabulary of ``vocab_size`` ids learned from ``stories`` (the training split).

    Words over 256 bytes are counted in pieces of 256 bytes.

    Raises:
        UserError: the size is out of range, or the text has too few distinct pairs for it.
    """
    from tokenizers import pre_tokenizers, trainers

    if not 258 <= vocab_size <= 1_000_000:
        raise UserError(f"bpe:{vocab_size}: the vocabulary size must be from 258 to 1,000,000")
    first = next(stories, None)
    if first is None:
        raise UserError(NO_STORIES)
    stories = itertools.chain([first], stories)
    trainer = _byte_level_trainer()
    options = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _in_a_thread(
        lambda stop: trainer.train_from_iterator(
            itertools.takewhile(lambda _: not stop.is_set(), _first_bytes(stories, TRAINING_BYTES)),
            options,
        )
    )
    vocabulary = trainer.get_vocab()
    if len(vocabulary) != vocab_size - 1:
        raise UserError(
            f"bpe:{vocab_size}: the training text only supports {len(vocabulary) + 1} ids; "
            "choose a smaller vocabulary or give more text"
        )
    to_byte = {character: byte for byte, character in byte_characters().items()}
    in_order = sorted(vocabulary, key=vocabulary.__getitem__)
    return Tokenizer(f"bpe:{vocab_size}", tuple(bytes(to_byte[c] for c in t) for t in in_order))


def _byte_level_trainer() -> Trainer:
    """The library's byte-pair encoder without a vocabulary; it counts words in pieces of 256 bytes."""
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Trainer

    trainer = Trainer(models.BPE())
    # After the first rule, every byte is a character; shorter words stay as they are.
    too_long = pre_tokenizers.Split(Regex(f".{{{TRAINING_WORD_BYTES}}}"), "isolated")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer.pre_tokenizer = pre_tokenizers.Sequence([words, too_long])
    return trainer


def _in_a_thread(work: Callable[[Event], None]) -> None:
    """Do ``work`` in a thread and wait for it, so that Ctrl-C is heard: while the main thread is in the
    trainer's code, it hears none. ``work`` ends early once its event is set."""
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(work, stop).result()
        finally:
            stop.set()


def _first_bytes(stories: Iterator[str], limit: int) -> Iterator[str]:
    total = 0
    for story in stories:
        yield story
        total += len(story)
        if total >= limit:
            return


def byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else 256, 257, …."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return table
