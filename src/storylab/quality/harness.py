"""Questions answered by a model under lm-evaluation-harness, without a network.

Imports ``lm_eval`` (the extra ``eval``), so nothing but the verb's work imports this module.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
from lm_eval import evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask

from storylab.model.generate import Sampling
from storylab.quality import TaskName
from storylab.quality.likelihood import score_continuations
from storylab.quality.questions import TASKS, Question, Questions
from storylab.training.evaluation import Tick
from storylab.training.sampling import DEFAULT_TOKENS, StoryModel, as_in_stories

SPLIT = "validation"


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task.

    Attributes:
        task: name of the task.
        metric: our name of the metric.
        value: mean over the items.
        standard_error: of ``value``, over items; NaN for one item.
        chance: value of guessing.
        items: number of questions.
    """

    task: TaskName
    metric: str
    value: float
    standard_error: float
    chance: float
    items: int


class StoryLM(TemplateLM):  # type: ignore[misc] # the library has no types
    """A model as lm-evaluation-harness calls it; the id that begins a story comes before every text.

    Args:
        model: a run's model, or an imported one.
        tick: called before every batch with the windows done and all of them.
    """

    def __init__(self, model: StoryModel, tick: Tick = lambda done, total: None) -> None:
        super().__init__()
        self._model, self._tick = model, tick

    @property
    def eot_token_id(self) -> int:
        """The id that ends a story."""
        return self._model.tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """The id that begins a story."""
        return self._model.tokenizer.begin_of_text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text, after the id that begins a story unless ``add_special_tokens`` is False."""
        ids = self._model.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = score_continuations(self._model, pairs, self._tick)
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in nats."""
        texts = [self._model.tokenizer.encode(request.args[0]) for request in requests]
        pairs = [([self.prefix_token_id], text) for text in texts]
        return [s.log_likelihood for s in score_continuations(self._model, pairs, self._tick)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to the first of its stops."""
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        temperature = options.get("temperature", 1.0) if options.get("do_sample") else 0.0
        sampling = Sampling(temperature=temperature, top_p=options.get("top_p", 1.0))
        most = int(options.get("max_gen_toks", DEFAULT_TOKENS))
        (text,) = self._model.sample(context, sampling, most)
        text = text.removeprefix(as_in_stories(context))
        stops = options.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.partition(stop)[0]
        return text


def answer(
    model: StoryModel, questions: dict[TaskName, Questions], tick: Tick = lambda done, total: None
) -> list[TaskScore]:
    """Have a model answer the questions of each task; a score for each metric.

    The metrics and their standard errors are the library's. The model's answer is the most likely choice,
    by its whole log-likelihood (accuracy) or by that divided by its bytes (accuracy_per_byte). An answer
    without other choices is right if each of its tokens is the most likely one.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # The library's own bars; ours is on the terminal already.
    with contextlib.redirect_stderr(io.StringIO()):
        tasks = {name: _task(name, asked.items) for name, asked in questions.items()}
        found = evaluate(StoryLM(model, tick), tasks, log_samples=False)["results"]
    return [
        TaskScore(
            task=name,
            metric=ours,
            value=float(found[name][f"{theirs},none"]),
            # With one item it is the text "N/A".
            standard_error=_number(found[name][f"{theirs}_stderr,none"]),
            chance=asked.chance,
            items=len(asked.items),
        )
        for name, asked in questions.items()
        for ours, theirs in TASKS[name].metrics.items()
    ]


def _number(value: Any) -> float:
    return float("nan") if isinstance(value, str) else float(value)


def _task(name: TaskName, items: Sequence[Question]) -> Any:
    """Questions as a task of the library."""
    rows = datasets.Dataset.from_list([asdict(item) for item in items])
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda: {SPLIT: rows},
        "validation_split": SPLIT,
        "target_delimiter": "",
        "doc_to_text": lambda row: row["context"],
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in TASKS[name].metrics.values()
        ],
    }
    if len(items[0].choices) == 1:
        config |= {"output_type": "loglikelihood", "doc_to_target": lambda row: row["choices"][0]}
    else:
        config |= {
            "output_type": "multiple_choice",
            "doc_to_choice": lambda row: row["choices"],
            "doc_to_target": lambda row: row["answer"],
        }
    return ConfigurableTask(config=config)
