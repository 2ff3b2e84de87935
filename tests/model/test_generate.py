"""Generation with a cache against the whole sequence, and sampling."""

from __future__ import annotations

import pytest
import torch

from small_models import SHAPES, VOCAB, tokens
from storylab.errors import UserError
from storylab.model.cache import KVCache
from storylab.model.generate import Sampling, generate, next_token_probabilities
from storylab.model.transformer import Transformer


def test_cache_gives_the_logits_of_the_whole_sequence(any_model: Transformer) -> None:
    model = any_model
    x = tokens(3, 15)
    cache = KVCache(model.config, 3, 15, torch.device("cpu"))
    parts = [
        model.logits(model.hidden_states(x[:, a:b], cache))
        for a, b in ((0, 6), (6, 7), (7, 11), (11, 15))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt_length", [1, 5, 40])
def test_cached_generation_equals_the_slow_one(prompt_length: int, any_model: Transformer) -> None:
    model = any_model
    prompt = tokens(4, prompt_length)
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=7)
    # 30 tokens in a context of 12: the context fills and is cut several times.
    fast, slow = (
        torch.stack(list(generate(model, prompt, 30, sampling, 12, use_cache=cached)), dim=1)
        for cached in (True, False)
    )
    assert fast.shape == (4, 30)
    assert torch.equal(fast, slow)


def test_sampling_seed_and_greedy() -> None:
    model = Transformer(SHAPES[0], VOCAB, seed=2)

    def run(**how: float) -> list[list[int]]:
        sampling = Sampling(**how)  # type: ignore[arg-type]
        return torch.stack(list(generate(model, tokens(2, 3), 10, sampling, 64))).tolist()

    assert run(seed=1) == run(seed=1) != run(seed=2)
    x = tokens(2, 3)
    for _ in range(10):
        x = torch.cat((x, model(x)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert run(temperature=0) == x[:, 3:].T.tolist()


def test_weights_that_are_not_finite_are_refused() -> None:
    model = Transformer(SHAPES[0], VOCAB, seed=2)
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        next(generate(model, tokens(2, 3), 1, Sampling(), 64))


def test_next_token_probabilities() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    plain = next_token_probabilities(logits, Sampling(temperature=1.0))
    torch.testing.assert_close(plain, torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    top_k = next_token_probabilities(logits, Sampling(temperature=1.0, top_k=2))
    torch.testing.assert_close(top_k, torch.tensor([[4 / 7, 3 / 7, 0.0, 0.0]]))
    top_p = next_token_probabilities(logits, Sampling(temperature=1.0, top_p=0.65))
    torch.testing.assert_close(top_p, torch.tensor([[4 / 7, 3 / 7, 0.0, 0.0]]))
    tiny = next_token_probabilities(logits, Sampling(temperature=1.0, top_p=0.01))
    torch.testing.assert_close(tiny, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    for temperature in (1e-40, 1e-320, 5e-324):
        coldest = next_token_probabilities(logits, Sampling(temperature=temperature))
        torch.testing.assert_close(coldest, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    for temperature in (1e30, 1e300, 1.7e308):
        hottest = next_token_probabilities(logits, Sampling(temperature=temperature))
        torch.testing.assert_close(hottest, torch.full((1, 4), 0.25))
    for top_p in (1e-40, 1e-320, 5e-324):
        narrow = next_token_probabilities(logits, Sampling(temperature=1.0, top_p=top_p))
        torch.testing.assert_close(narrow, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    cold = next_token_probabilities(logits, Sampling(temperature=0.5))
    torch.testing.assert_close(cold, torch.tensor([[16, 9, 4, 1]]) / 30)
