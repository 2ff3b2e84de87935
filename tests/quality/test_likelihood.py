"""Log-likelihoods of continuations against one token at a time in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from storylab.quality.likelihood import score_continuations
from storylab.record.folder import open_run
from storylab.record.run import Run
from storylab.training.sampling import StoryModel, load_story_model


def reference(model: StoryModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Every token after at most ``block_size`` tokens, one pass of the model in float64 each."""
    double = copy.deepcopy(model.model).double()
    ids, size, total, greedy = [*context, *continuation], model.block_size, 0.0, True
    for place in range(len(context), len(ids)):
        # A continuation is read in windows of at most block_size tokens of its own.
        stop = min(place - (place - len(context)) % size + size, len(ids))
        begin = max(0, stop - size - 1)
        with torch.no_grad():
            logits = double(torch.tensor([ids[begin:place]]))[0, -1]
        total += float(logits.log_softmax(-1)[ids[place]])
        greedy &= int(logits.argmax()) == ids[place]
    return total, greedy


@pytest.mark.slow
def test_scores_are_those_of_single_tokens(run: Run) -> None:
    """Shorter and longer than a window, in batches of several; greedy where the model wrote it."""
    model = load_story_model(open_run(run.folder), device="cpu")
    end, size = model.tokenizer.end_of_text, model.block_size
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for before, after in (
        (1, 3),
        (5, 1),
        (size, 4),
        (2 * size, size),
        (3, 2 * size + 5),
        (1, size),
    ):
        ids = torch.randint(end, (before + after,), generator=generator).tolist()
        pairs.append(([end, *ids[1:before]], ids[before:]))
    written = [int(i) for i in model.ids("Tom", None, 4)]
    prompt = [end, *model.tokenizer.encode("Tom")]
    with torch.no_grad():
        best = int(model.model(torch.tensor([prompt]))[0, -1].argmax())
    pairs += [(prompt, [best]), (prompt, written)]
    found = score_continuations(model, pairs)
    for pair, score in zip(pairs, found, strict=True):
        likelihood, greedy = reference(model, *pair)
        assert score.log_likelihood == pytest.approx(likelihood, rel=1e-5, abs=1e-4)
        assert score.greedy == greedy
    assert found[-2].greedy
    alone = [score_continuations(model, [pair])[0].log_likelihood for pair in pairs]
    assert alone == pytest.approx([score.log_likelihood for score in found], rel=1e-5)
