"""The self-check of an export: our model's logits and greedy tokens for three prompts, stored with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from storylab.data import builtin
from storylab.data.tokenizer import Tokenizer
from storylab.errors import UserError
from storylab.export.exporter import Reader, save_tensors
from storylab.files import open_file
from storylab.model.generate import Sampling, generate
from storylab.model.transformer import Transformer

REFERENCE = "storylab_reference.safetensors"
SHORT_PROMPTS = ("Once upon a time there was a little", "Tom was sad because")
# Tokens of the third prompt, or twice the window if that is longer.
LONG_PROMPT = 256
# Greedy tokens after a prompt.
NEW_TOKENS = 32
# Positions of a prompt whose logits are stored: all of 1,024 with GPT-2's vocabulary would be 200 MB.
POSITIONS = 8


@dataclass(frozen=True)
class Prompt:
    """A prompt with the results of our model.

    Attributes:
        text: the beginning of a story.
        ids: its tokens, with the id that begins a story.
        positions: indices of ``ids`` that ``logits`` are for; the last is the end of the prompt.
        logits: logits of the token after each of ``positions``, ``[P, V]`` float32.
        greedy: the most likely next tokens in turn, up to the end of the story.
        margins: for each of ``greedy``, the distance of its logit from the second highest.
    """

    text: str
    ids: list[int]
    positions: list[int]
    logits: Tensor
    greedy: list[int]
    margins: list[float]


@dataclass(frozen=True)
class Agreement:
    """How far a program agrees with our model.

    Attributes:
        difference: largest difference of a logit, as a share of the largest logit.
        tokens: number of greedy tokens that are equal.
        lengths: number of tokens of each prompt.
    """

    difference: float
    tokens: int
    lengths: tuple[int, ...]


def make_reference(model: Transformer, tokenizer: Tokenizer, block_size: int) -> list[Prompt]:
    """Our model's results for three prompts, the last of them longer than its windows.

    Windows that the context of ``block_size`` tokens never leaves do not count.

    Args:
        model: in float32 on the CPU, its weights as the format holds them.
        tokenizer: makes the prompts' ids.
        block_size: greatest number of tokens that the model reads at once.
    """
    room = block_size - min(NEW_TOKENS, block_size // 2)
    sizes = [pattern.reach for pattern in model.config.layer_patterns if pattern.reach is not None]
    window = max((size for size in sizes if size < block_size), default=0)
    # In a context hardly longer than the window, a prompt beyond it leaves less room for new tokens.
    length = max(min(room, max(LONG_PROMPT, 2 * window)), window + 1)
    stories = " ".join(builtin.stories(0, 0, 1 + length // 50))
    prompts = [*((text, room) for text in SHORT_PROMPTS), (stories, length)]
    return [_run(model, tokenizer, text, most, block_size) for text, most in prompts]


def _run(model: Transformer, tokenizer: Tokenizer, text: str, most: int, block_size: int) -> Prompt:
    """Our model's results for the beginning of ``text``, of at most ``most`` tokens."""
    text = _beginning(tokenizer, text, most)
    ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
    count = min(NEW_TOKENS, block_size - len(ids))
    stream = generate(model, torch.tensor([ids]), count, Sampling(temperature=0), block_size)
    greedy = [int(token) for token in stream]
    if tokenizer.end_of_text in greedy:
        greedy = greedy[: greedy.index(tokenizer.end_of_text) + 1]
    positions = sorted({round(x) for x in torch.linspace(0, len(ids) - 1, POSITIONS).tolist()})
    with torch.no_grad():
        logits = model(torch.tensor([ids + greedy[:-1]]))[0]
    best = logits[len(ids) - 1 :].topk(2, dim=-1).values[: len(greedy)]
    margins = (best[:, 0] - best[:, 1]).tolist()
    return Prompt(text, ids, positions, logits[positions].contiguous(), greedy, margins)


def _beginning(tokenizer: Tokenizer, text: str, most: int) -> str:
    """The beginning of ``text`` that is at most ``most`` tokens long with the id that begins a story."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if 1 + len(tokenizer.encode(text[:middle])) <= most:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def save_reference(prompts: Sequence[Prompt], folder: Path) -> None:
    """Write the tensors of ``prompts`` into ``folder``; the texts go into the record of the export."""
    tensors: dict[str, Tensor] = {}
    for number, prompt in enumerate(prompts):
        tensors |= {
            f"{number}.ids": torch.tensor(prompt.ids),
            f"{number}.positions": torch.tensor(prompt.positions),
            f"{number}.logits": prompt.logits,
            f"{number}.greedy": torch.tensor(prompt.greedy, dtype=torch.int64),
            f"{number}.margins": torch.tensor(prompt.margins),
        }
    save_tensors(tensors, folder / REFERENCE)


def load_reference(texts: Sequence[str], folder: Path) -> list[Prompt]:
    """Read the reference in ``folder``, for the prompts ``texts``.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / REFERENCE
    with open_file(path):
        pass  # the library reports any file that it cannot open as missing
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return [
                Prompt(
                    text,
                    file.get_tensor(f"{number}.ids").tolist(),
                    file.get_tensor(f"{number}.positions").tolist(),
                    file.get_tensor(f"{number}.logits"),
                    file.get_tensor(f"{number}.greedy").tolist(),
                    file.get_tensor(f"{number}.margins").tolist(),
                )
                for number, text in enumerate(texts)
            ]
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole reference ({error}): export the run again"
        ) from error


def compare(reader: Reader, prompts: Sequence[Prompt], tolerance: float) -> Agreement:
    """Run ``prompts`` in another program and compare its results with our model's.

    A greedy token may differ where our model's two best logits are within the tolerance of each other;
    what follows it is not compared then.

    Args:
        reader: the exported model in that program.
        prompts: our results.
        tolerance: largest difference of a logit, as a share of the largest logit.

    Raises:
        UserError: they differ; the message names the prompt and the difference.
    """
    largest, tokens = 0.0, 0
    for number, prompt in enumerate(prompts, start=1):
        place = (
            f"{reader.label} differs from our model on prompt {number} ({len(prompt.ids)} tokens)"
        )
        if reader.encode(prompt.text) != prompt.ids:
            raise UserError(f"{place}: its tokens are others")
        scale = float(prompt.logits.abs().max())
        theirs = reader.logits(prompt.ids)[prompt.positions]
        difference = float((theirs - prompt.logits).abs().max()) / scale
        if not difference <= tolerance:
            raise UserError(
                f"{place}: logits by {difference:.1e} of the largest, where at most {tolerance:.0e} is "
                "rounding"
            )
        largest = max(largest, difference)
        tokens += _equal_tokens(reader, prompt, 2 * tolerance * scale, place)
    return Agreement(largest, tokens, tuple(len(prompt.ids) for prompt in prompts))


def _equal_tokens(reader: Reader, prompt: Prompt, tie: float, place: str) -> int:
    """Number of equal greedy tokens; two logits within ``tie`` may change places."""
    if not prompt.greedy:
        return 0
    theirs = reader.greedy(prompt.ids, len(prompt.greedy))
    pairs = zip(prompt.greedy, theirs, strict=False)
    equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if equal < len(prompt.greedy) and prompt.margins[equal] > tie:
        raise UserError(f"{place}: greedy token {equal + 1} is another")
    return equal
