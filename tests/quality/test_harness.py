"""Tasks under lm-evaluation-harness: accuracies and log-likelihoods against float64, without a network."""

from __future__ import annotations

import copy
import dataclasses
import socket
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

import msgspec
import numpy as np
import pytest
import torch

from storylab.cli import main
from storylab.data.dataset import Dataset
from storylab.data.tokenizer import Tokenizer
from storylab.documents import EvalDocument
from storylab.model.generate import Sampling
from storylab.quality.questions import TASKS, Question, Questions, held_out_stories
from storylab.record.folder import open_run
from storylab.record.run import Run
from storylab.training.sampling import StoryModel, load_story_model

pytest.importorskip("lm_eval", reason="the eval extra is not installed")

pytestmark = pytest.mark.slow  # importing the library takes seconds
ITEMS = 5


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any connection fails; warnings of a library that we only call are no errors."""

    def refuse(*args: Any) -> NoReturn:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class OtherBegin(Tokenizer):
    """Texts begin with another id than the one that ends them, as for many imported models."""

    @property
    def begin_of_text(self) -> int:
        return 5


@pytest.fixture(params=["ours", "other begin"])
def model(run: Run, request: pytest.FixtureRequest) -> StoryModel:
    model = load_story_model(open_run(run.folder), device="cpu")
    if request.param == "ours":
        return model
    tokenizer = model.tokenizer
    assert isinstance(tokenizer, Tokenizer)
    return dataclasses.replace(model, tokenizer=OtherBegin(tokenizer.name, tokenizer.tokens))


def questions(dataset: Dataset) -> dict[Any, Questions]:
    stories = held_out_stories(dataset)
    return {name: task.make(stories, ITEMS) for name, task in TASKS.items()}


def direct(model: StoryModel, question: Question) -> list[tuple[float, bool]]:
    """Log-likelihood of each choice and whether it is greedy, one text at a time in float64."""
    double, tokenizer = copy.deepcopy(model.model).double(), model.tokenizer
    context = [tokenizer.begin_of_text, *tokenizer.encode(question.context)]
    found = []
    for choice in question.choices:
        ids = [*context, *tokenizer.encode(choice)][-model.block_size - 1 :]
        count = len(tokenizer.encode(choice))
        assert count <= model.block_size
        with torch.no_grad():
            logits = double(torch.tensor([ids[:-1]]))[0, -count:]
        wanted = torch.tensor(ids[-count:])
        each = logits.log_softmax(-1)[torch.arange(count), wanted]
        found.append((float(each.sum()), bool((logits.argmax(-1) == wanted).all())))
    return found


def test_scores_are_those_of_a_direct_computation(dataset: Dataset, model: StoryModel) -> None:
    from lm_eval import evaluate

    from storylab.quality.harness import StoryLM, _task, answer

    asked = questions(dataset)
    found = {(s.task, s.metric): s for s in answer(model, asked)}
    assert found.keys() == {
        ("last_word", "accuracy"), ("endings", "accuracy"), ("endings", "accuracy_per_byte"),
    }  # fmt: skip
    log = evaluate(StoryLM(model), {n: _task(n, q.items) for n, q in asked.items()})["samples"]
    right: dict[tuple[str, str], list[bool]] = {key: [] for key in found}
    for name, made in asked.items():
        for question, sample in zip(made.items, log[name], strict=True):
            ours = direct(model, question)
            theirs = [response[0] for response in sample["resps"]]
            assert [r[0] for r in theirs] == pytest.approx([o[0] for o in ours], rel=1e-5)
            assert [r[1] for r in theirs] == [o[1] for o in ours]
            if name == "last_word":
                right[name, "accuracy"].append(ours[0][1])
                continue
            sums = [o[0] for o in ours]
            sizes = [len(choice.encode()) for choice in question.choices]
            per_byte = [s / size for s, size in zip(sums, sizes, strict=True)]
            right[name, "accuracy"].append(int(np.argmax(sums)) == question.answer)
            right[name, "accuracy_per_byte"].append(int(np.argmax(per_byte)) == question.answer)
    for key, answers in right.items():
        score = found[key]
        assert score.value == pytest.approx(np.mean(answers)) and score.items == len(answers)
        error = np.std(answers, ddof=1) / np.sqrt(len(answers))
        assert score.standard_error == pytest.approx(error)
    assert found["endings", "accuracy"].chance == 0.25


def test_a_model_without_a_preference_answers_by_chance(
    dataset: Dataset, model: StoryModel
) -> None:
    """All tokens equally likely: the shortest choice has the highest likelihood, whatever it says."""
    from storylab.quality.harness import answer

    with torch.no_grad():
        model.model.embedding.weight.zero_()
    made = TASKS["endings"].make(held_out_stories(dataset), 100)
    (accuracy, _) = answer(model, {"endings": made})
    lengths = [
        [len(model.tokenizer.encode(choice)) for choice in item.choices] for item in made.items
    ]
    expected = np.mean(
        [int(np.argmin(n)) == item.answer for n, item in zip(lengths, made.items, strict=True)]
    )
    assert accuracy.value == pytest.approx(expected)


def test_one_question_has_no_standard_error(dataset: Dataset, model: StoryModel) -> None:
    from storylab.quality.harness import answer

    made = TASKS["last_word"].make(held_out_stories(dataset), 1)
    (score,) = answer(model, {"last_word": made})
    assert score.items == 1 and np.isnan(score.standard_error)


def test_the_library_can_ask_in_its_other_ways(model: StoryModel) -> None:
    """Whole texts against the sum of their tokens; greedy text against the sampler's, up to a stop."""
    from lm_eval.api.instance import Instance

    from storylab.quality.harness import StoryLM

    lm = StoryLM(model)
    text = "Tom ran home."

    def ask(kind: str, *arguments: Any) -> list[Instance]:
        return [Instance(request_type=kind, doc={}, arguments=arguments, idx=0)]

    (rolling,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", text))
    ((whole, _),) = lm.loglikelihood(ask("loglikelihood", "", text))
    expected = direct(model, Question(0, "", (text,)))[0][0]
    assert rolling == pytest.approx(expected, rel=1e-5) and whole == pytest.approx(rolling)
    (plain,) = model.sample("Tom", Sampling(temperature=0), 12)
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    assert lm.generate_until(ask("generate_until", "Tom", options)) == [plain.removeprefix("Tom")]
    stop = plain.removeprefix("Tom")[3]
    (stopped,) = lm.generate_until(ask("generate_until", "Tom", options | {"until": [stop]}))
    assert stopped == plain.removeprefix("Tom").partition(stop)[0] and stop not in stopped


def test_eval_prints_them(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(run.folder), "--tasks", "last_word", "endings", "--questions", str(ITEMS)]
    words += ["--device", "cpu"]
    assert main([*words, "--json"]) == 0
    captured = capsys.readouterr()
    found = msgspec.json.decode(captured.out, type=EvalDocument)
    assert captured.err == "" and [task.items for task in found.tasks] == [ITEMS] * 3
    assert main(words) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("endings"))
    assert "chance 25.0%" in line and f"{found.tasks[1].value:.1%}" in line
