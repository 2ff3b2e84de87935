"""Questions follow from the stories alone, and their parts are the stories'."""

from __future__ import annotations

import pytest

from storylab.data.dataset import Dataset, Split
from storylab.errors import UserError
from storylab.quality.questions import endings, held_out_stories, last_words

STORIES = [
    (4, "Tom ran home. He was very tired."),
    (2, 'Ann had a cat.\n\n"Good night, mother-in-law!"'),
    (9, "Bob sat. Then Bob slept... The dog's tail wagged?"),
    (5, "Sue said Hello! She smiled 3"),
    (7, "One sentence without an end"),
    (1, "Ed fell. He cried again."),
]


def test_the_last_word_follows_a_space() -> None:
    found = last_words(STORIES, 10)
    assert [(q.story, q.choices) for q in found.items] == [
        (4, (" tired",)), (2, (" mother-in-law",)), (9, (" wagged",)), (7, (" end",)), (1, (" again",)),
    ]  # fmt: skip
    assert found.items[1].context == 'Ann had a cat.\n\n"Good night,'
    assert found.chance == 1 / 5
    assert len(last_words(STORIES, 2).items) == 2
    with pytest.raises(UserError, match="no validation story ends with a word"):
        last_words([(0, "1 2 3")], 10)


def test_endings_are_last_sentences_of_different_stories() -> None:
    found = endings(STORIES, 10)
    assert found.chance == 0.25
    right = {question.story: question for question in found.items}
    assert right.keys() == {4, 2, 9, 5, 1}
    sentences = {
        4: " He was very tired.",
        2: '\n\n"Good night, mother-in-law!"',
        9: " The dog's tail wagged?",
        5: " She smiled 3",
        1: " He cried again.",
    }
    own = {sentence.strip() for sentence in sentences.values()}
    for number, question in right.items():
        assert question.choices[question.answer] == sentences[number]
        assert question.context + sentences[number] == dict(STORIES)[number]
        assert len({choice.strip() for choice in question.choices} & own) == 4
        space = sentences[number][: -len(sentences[number].lstrip())]
        assert all(choice[: len(space)] == space for choice in question.choices)
    assert [question.answer for question in found.items] == [0, 1, 2, 3, 0]


def test_common_endings_are_left_out() -> None:
    common = [(number, f"Story {number}. The end.") for number in range(10, 20)]
    found = endings([*common, *STORIES], 100)
    assert {question.story for question in found.items} == {4, 2, 9, 5, 1}
    assert not any("The end." in choice for q in found.items for choice in q.choices)
    with pytest.raises(UserError, match="fewer than 4 endings"):
        endings([*common, *STORIES[:3]], 100)


def test_questions_follow_from_the_data_set_and_leave_the_test_split_closed(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Dataset) -> Split:
        raise AssertionError("the test split was opened")

    monkeypatch.setattr(Dataset, "open_test", refuse)
    stories = held_out_stories(dataset)
    split = dataset.splits["validation"]
    assert sorted(number for number, _ in stories) == list(range(len(split.stories) - 1))
    assert sum(len(text.encode()) for _, text in stories) == split.text_bytes
    assert held_out_stories(dataset) == stories
    number, text = stories[0]
    ids = split.read(split.stories[number, 0], split.stories[number + 1, 0] - 1)
    assert dataset.tokenizer.encode(text) == ids.tolist()
