"""Questions made from held-out stories; a task is one entry in :data:`TASKS`.

They follow from the data set alone: two runs on the same data answer the same questions. The test split
stays closed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from storylab.data.batches import permutation
from storylab.data.dataset import Dataset
from storylab.data.layout import VALIDATION
from storylab.errors import UserError
from storylab.quality import TaskName

CHOICES = 4
# An ending that more than this share of the stories have, such as "The end.", would fit many of them.
COMMON_SHARE = 0.01

# A word after a space, followed by punctuation at most: letters, with apostrophes and hyphens inside.
_LAST_WORD = re.compile(r"(.*\S)( [^\W\d_]+(?:['\u2019-][^\W\d_]+)*)[^\w]*", re.DOTALL)
# A mark that ends a sentence, with the quotes and brackets that it closes, and white space after it.
_SENTENCE_END = re.compile(r"""[.!?]["'\u201d\u2019)]*(\s+)(?=\S)""")
_OPENING = "\"'\u201c\u2018("


@dataclass(frozen=True)
class Question:
    """A beginning and its possible continuations.

    Attributes:
        story: number of the story in its split.
        context: text without white space at its end.
        choices: continuations, each with the white space before it; one if the model is to find it.
        answer: index of the right one.
    """

    story: int
    context: str
    choices: tuple[str, ...]
    answer: int = 0


@dataclass(frozen=True)
class Questions:
    """The questions of a task.

    Attributes:
        items: the questions.
        chance: accuracy of guessing: by chance among several choices, else that of the best single guess.
    """

    items: list[Question]
    chance: float


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        make: makes at most so many questions of numbered stories, in their order.
        metrics: names in lm-evaluation-harness of the metrics, by ours.
    """

    make: Callable[[Sequence[tuple[int, str]], int], Questions]
    metrics: dict[str, str]


def last_words(stories: Sequence[tuple[int, str]], most: int) -> Questions:
    """Ask for the last word of each story, as LAMBADA does (Paperno et al. 2016, arXiv 1606.06031).

    A story whose last word does not follow a space is left out.

    Raises:
        UserError: no story has such a word.
    """
    found = ((number, _LAST_WORD.fullmatch(text.strip())) for number, text in stories)
    items = [Question(number, match[1], (match[2],)) for number, match in found if match][:most]
    if not items:
        raise UserError("no validation story ends with a word: last_word has no question")
    ((_, commonest),) = Counter(item.choices for item in items).most_common(1)
    return Questions(items, commonest / len(items))


def endings(stories: Sequence[tuple[int, str]], most: int) -> Questions:
    """Ask which of four sentences is a story's last: its own, or the last one of three other stories.

    The others are the next different endings in the order of the stories. Endings that more than 1 % of the
    stories have are neither asked for nor offered. The right one is at every place equally often.

    Raises:
        UserError: the stories have fewer than four such endings.
    """
    parts = [(number, *found) for number, text in stories if (found := _last_sentence(text))]
    counts = Counter(ending for *_, ending in parts)
    limit = max(1, COMMON_SHARE * len(stories))
    parts = [part for part in parts if counts[part[-1]] <= limit]
    if len({ending for *_, ending in parts}) < CHOICES:
        raise UserError(
            f"the validation stories have fewer than {CHOICES} endings that are not common ones: prepare "
            "more of them for the task endings"
        )
    items = []
    for place, (number, context, space, ending) in enumerate(parts[:most]):
        others: dict[str, None] = {}
        for step in range(1, len(parts)):
            other = parts[(place + step) % len(parts)][-1]
            if other != ending:
                others[other] = None
            if len(others) == CHOICES - 1:
                break
        answer = place % CHOICES
        choices = [*others]
        choices.insert(answer, ending)
        items.append(Question(number, context, tuple(space + text for text in choices), answer))
    return Questions(items, 1 / CHOICES)


def _last_sentence(text: str) -> tuple[str, str, str] | None:
    """A story as the text before its last sentence, the white space between, and that sentence; None for a
    story of one sentence."""
    text = text.strip()
    for match in reversed(list(_SENTENCE_END.finditer(text))):
        sentence = text[match.end() :]
        if sentence.lstrip(_OPENING)[:1].isupper():
            return text[: match.start(1)], match[1], sentence
    return None


TASKS: dict[TaskName, Task] = {
    "last_word": Task(last_words, {"accuracy": "acc"}),
    "endings": Task(endings, {"accuracy": "acc", "accuracy_per_byte": "acc_bytes"}),
}


def held_out_stories(dataset: Dataset) -> list[tuple[int, str]]:
    """The validation stories with their numbers, in an order that the data set decides."""
    split = dataset.splits[VALIDATION]
    borders = split.stories[:, 0].tolist()
    found = []
    for number in permutation(len(borders) - 1, f"{dataset.fingerprint}:questions").tolist():
        ids = split.read(borders[number], borders[number + 1] - 1)  # without the end of text
        found.append((number, dataset.tokenizer.decode(ids.tolist())))
    return found
