"""Stories from the model of a finished run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from record_folders import forget_checksums
from samples import MakeConfig
from storylab.errors import UserError
from storylab.training.sampling import load_story_model
from storylab.training.train import train


def test_another_story_may_come_before_the_prompt(tiny_config: MakeConfig) -> None:
    writer = load_story_model(train(tiny_config(max_iters=0)), device="cpu")
    seen: list[list[int]] = []

    def generated(model: Any, prompt: torch.Tensor, *rest: Any) -> Iterator[torch.Tensor]:
        seen.append(prompt[0].tolist())
        return iter(())

    with pytest.MonkeyPatch.context() as patch:
        # The prompt is seen where the model would read it.
        patch.setattr("storylab.training.sampling.generate", generated)
        writer.sample("<|endoftext|>One.<|endoftext|>Two ")
    end, encode = writer.tokenizer.end_of_text, writer.tokenizer.encode
    assert seen == [[end, *encode("One."), end, *encode("Two")]]


def test_weights_that_do_not_fit_the_config_are_refused(tiny_config: MakeConfig) -> None:
    run = train(tiny_config(max_iters=0))
    forget_checksums(run.folder)
    path = run.folder / "config.json"
    path.write_text(path.read_text().replace('"n_hidden": 48', '"n_hidden": 50'))
    with pytest.raises(UserError, match=r"config\.json"):
        load_story_model(run)


def test_a_stream_leaves_the_caller_its_own_modes(tiny_config: MakeConfig) -> None:
    model = load_story_model(train(tiny_config(max_iters=0, dtype="bfloat16")), device="cpu")
    for _ in zip(model.stream("a", max_new_tokens=3), model.stream("b"), strict=False):
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_sampling_stops_at_the_end_of_text(tiny_config: MakeConfig) -> None:
    model = load_story_model(train(tiny_config(max_iters=0)), device="cpu")
    rows = iter(
        [[5, 7], [model.tokenizer.end_of_text, 9], [6, model.tokenizer.end_of_text], [1, 1]]
    )
    columns = (torch.tensor(row) for row in rows)
    with pytest.MonkeyPatch.context() as patch:
        # An untrained model would not end its stories at known places.
        patch.setattr("storylab.training.sampling.generate", lambda *a, **k: columns)
        stories = model.sample("", count=2)
    assert stories == [model.tokenizer.decode([5]), model.tokenizer.decode([7, 9])]
