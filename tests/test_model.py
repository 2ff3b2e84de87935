"""The model against independent implementations, and its properties proved by gradients."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import HashStore
from torch.nn.parallel import DistributedDataParallel

from conftest import TINY
from storylab.compiler import missing_for_compiling
from storylab.config import ModelConfig
from storylab.errors import UserError
from storylab.model import head
from storylab.model.attention import MAX_MATMUL_ATTENTION_LENGTH, causal_attention
from storylab.model.cache import KVCache
from storylab.model.generate import Sampling, generate, next_token_probabilities
from storylab.model.head import ChunkSizes, linear_cross_entropy, token_losses
from storylab.model.initialization import initialize_weights
from storylab.model.layers import rope_cos_sin
from storylab.model.transformer import Transformer

SHAPES = [
    ModelConfig(n_layer=2, n_head=4, n_kv_head=4, n_embd=64, n_hidden=96),
    ModelConfig(n_layer=3, n_head=4, n_kv_head=1, n_embd=64, n_hidden=160),
    ModelConfig(n_layer=1, n_head=6, n_kv_head=2, n_embd=48, n_hidden=64, rope_base=500.0),
]
VOCAB = 97
OPTIONS: dict[str, Any] = {
    "qk_norm": True,
    "embedding_residual": True,
    "value_residual": "first_layer",
}


def tokens(batch: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def llama(config: ModelConfig, model: Transformer) -> torch.nn.Module:
    """The same weights in the Llama of `transformers`, or in its Qwen3, which is Llama with a QK norm."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    kind, its_config = LlamaForCausalLM, LlamaConfig
    if config.qk_norm:  # the gains of its norms begin at 1
        kind, its_config = Qwen3ForCausalLM, Qwen3Config
    other = kind(
        its_config(
            vocab_size=VOCAB,
            hidden_size=config.n_embd,
            intermediate_size=config.n_hidden,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            head_dim=config.head_size,
            rms_norm_eps=1e-5,
            rope_theta=config.rope_base,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    )
    other.load_state_dict(llama_names(config, dict(model.state_dict())), strict=False)
    return other


def llama_names(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under Llama's names, the joined matrices cut into its separate ones."""
    result = {
        "model.embed_tokens.weight": weights["embedding.weight"],
        "lm_head.weight": weights["embedding.weight"],
        "model.norm.weight": weights["norm.weight"],
    }
    kv = config.n_kv_head * config.head_size
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        qkv = weights[ours + "attention.qkv.weight"].split((config.n_embd, kv, kv))
        for name, part in zip("qkv", qkv, strict=True):
            result[f"{theirs}self_attn.{name}_proj.weight"] = part
        result[theirs + "self_attn.o_proj.weight"] = weights[ours + "attention.out.weight"]
        gate, up = weights[ours + "feed_forward.gate_up.weight"].chunk(2)
        result[theirs + "mlp.gate_proj.weight"] = gate
        result[theirs + "mlp.up_proj.weight"] = up
        result[theirs + "mlp.down_proj.weight"] = weights[ours + "feed_forward.down.weight"]
        norm = weights[ours + "attention_norm.weight"]
        result[theirs + "input_layernorm.weight"] = norm
        norm = weights[ours + "feed_forward_norm.weight"]
        result[theirs + "post_attention_layernorm.weight"] = norm
    return result


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("config", SHAPES)
def test_logits_and_gradients_are_those_of_llama(config: ModelConfig, qk_norm: bool) -> None:
    config = dataclasses.replace(config, qk_norm=qk_norm)
    model = Transformer(config, VOCAB, seed=3)
    with torch.no_grad():  # larger weights than at the start, so that every part matters
        for p in model.parameters():
            p.mul_(5.0 if p.dim() > 1 else 1.0)
    other = llama(config, model)
    x, y = tokens(2, 24), tokens(2, 24, seed=1)
    theirs = other(input_ids=x).logits
    torch.testing.assert_close(model(x), theirs, rtol=1e-4, atol=1e-4)

    model(x, y).backward()
    F.cross_entropy(theirs.flatten(0, 1), y.flatten()).backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = dict(other.named_parameters())
    for name, grad in llama_names(config, ours).items():
        if name != "lm_head.weight":  # tied: the same parameter as the embedding
            torch.testing.assert_close(grad, expected[name].grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_epsilon_of_every_norm_is_that_of_llama(qk_norm: bool) -> None:
    """With activations so small that the epsilon is most of what a norm divides by."""
    config = dataclasses.replace(SHAPES[1], qk_norm=qk_norm)
    model = Transformer(config, VOCAB, seed=3)
    with torch.no_grad():
        model.embedding.weight.mul_(0.05)
        for block in model.blocks:
            block.get_parameter("attention.qkv.weight").mul_(0.1)
    other, x = llama(config, model), tokens(2, 24)
    ours, theirs = model(x), other(input_ids=x).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())
    assert other.config.rms_norm_eps == 1e-5


def test_a_wrapper_sees_the_loss_and_its_gradients() -> None:
    """torch's data-parallel wrapper reduces gradients in the backward pass of its own forward."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = Transformer(TINY, VOCAB, seed=1)
        wrapped = DistributedDataParallel(model)
        x, y = tokens(3, 12), tokens(3, 12, seed=1)
        loss = wrapped(x, y)
        loss.backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        expected = torch.autograd.grad(model(x, y), list(model.parameters()))
        assert torch.equal(loss, model(x, y)) and loss.dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        torch.distributed.destroy_process_group()


def test_no_gradient_flows_from_later_tokens() -> None:
    """Logits at t depend on every input up to t (t included) and on none after it."""
    config = SHAPES[1]
    model = Transformer(config, VOCAB, seed=0)
    x = tokens(1, 12)
    embedded = model.embedding(x).detach().requires_grad_()
    model.embedding.forward = lambda _: embedded  # type: ignore[method-assign]
    for t in (0, 5, 11):
        (grad,) = torch.autograd.grad(model(x)[0, t].square().sum(), embedded)
        reached = grad[0].abs().sum(-1) > 0
        assert reached.tolist() == [i <= t for i in range(12)]


def weights(config: ModelConfig, seed: int = 5, vocab: int = 500) -> dict[str, Tensor]:
    return dict(Transformer(config, vocab, seed).state_dict())


WIDE = ModelConfig(n_layer=8, n_head=4, n_kv_head=2, n_embd=128, n_hidden=256)
OF_RESIDUAL = ("out.weight", "down.weight")


def test_distribution_of_initial_weights() -> None:
    for name, p in weights(WIDE).items():
        if p.dim() < 2:
            assert bool((p == 1).all())
            continue
        std = 0.02 / math.sqrt(16) if name.endswith(OF_RESIDUAL) else 0.02
        # Five standard errors of the mean, of the standard deviation, and of the share within one.
        root, within = math.sqrt(p.numel()), math.erf(math.sqrt(0.5))
        assert abs(p.mean().item()) < 5 * std / root
        assert p.std().item() == pytest.approx(std, rel=5 / (math.sqrt(2) * root))
        share = (p.abs() < std).double().mean().item()
        assert share == pytest.approx(within, abs=5 * math.sqrt(within * (1 - within)) / root)


def test_initial_weights_of_two_parameters_are_not_correlated() -> None:
    """Nor are those of one parameter under two seeds."""
    drawn = {(seed, k): v for seed in (5, 6) for k, v in weights(WIDE, seed).items() if v.dim() > 1}
    size = min(x.numel() for x in drawn.values())
    table = torch.stack([x.flatten()[:size] for x in drawn.values()])
    correlations = torch.corrcoef(table).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / math.sqrt(size)


@pytest.mark.parametrize(
    "change",
    [
        {"attention": "window:8"},
        {"attention": "window:8*7,full"},
        {"qk_norm": True},
        {"value_residual": "first_layer"},
        {"embedding_residual": True},
        {"rope_base": 500.0},
        OPTIONS,
    ],
    ids=lambda change: " ".join(change),
)
def test_models_that_differ_in_a_part_share_the_rest(change: dict[str, Any]) -> None:
    plain, other = weights(WIDE), weights(dataclasses.replace(WIDE, **change))
    assert plain.keys() <= other.keys()
    assert all(torch.equal(other[name], plain[name]) for name in plain)


@pytest.mark.parametrize("layers", [1, 9, 16])
def test_models_of_another_depth_share_their_common_layers(layers: int) -> None:
    """The scale of projections that write to the residual stream depends on the depth."""
    one, other = weights(WIDE), weights(dataclasses.replace(WIDE, n_layer=layers))
    common = one.keys() & other.keys()
    assert len(common) == min(len(one), len(other))
    for name in common:
        if name.endswith(OF_RESIDUAL):
            ratio = math.sqrt(WIDE.n_layer / layers)
            torch.testing.assert_close(other[name], one[name] * ratio, rtol=1e-6, atol=0)
        else:
            assert torch.equal(one[name], other[name]), name


def test_a_change_of_shape_leaves_the_other_parameters() -> None:
    one, other = weights(WIDE), weights(dataclasses.replace(WIDE, n_hidden=384), vocab=700)
    same = {name for name in one if torch.equal(one[name], other[name])}
    reshaped = ("embedding.weight", "gate_up.weight", "down.weight")
    assert same == {name for name in one if not name.endswith(reshaped)}


def test_initial_weights_of_a_seed() -> None:
    """A seed gives the same weights again; another seed shares no random one."""
    one, again, other = weights(WIDE), weights(WIDE), weights(WIDE, seed=6)
    assert all(torch.equal(one[name], again[name]) for name in one)
    for name, p in one.items():
        if p.dim() > 1:
            assert (p == other[name]).float().mean() < 1e-3, name


def test_order_of_parameters_does_not_matter_to_initial_weights() -> None:
    """Nor does the state of torch's own generator."""
    model = Transformer(SHAPES[1], VOCAB, seed=4)
    before = dict(model.state_dict())
    turned = Transformer(SHAPES[1], VOCAB, seed=0)
    turned._modules = dict(reversed(turned._modules.items()))
    for block in turned.blocks:
        block._modules = dict(reversed(block._modules.items()))
    assert [*turned.state_dict()] != [*before]
    torch.manual_seed(123)
    initialize_weights(turned, SHAPES[1].n_layer, seed=4)
    assert all(torch.equal(turned.state_dict()[name], p) for name, p in before.items())


def brute_force_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One query position and head at a time, in float64."""
    batch, heads, time, size = query.shape
    group, past = heads // key.shape[1], key.shape[2] - time
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(time):
                keys = key[b, h // group, : past + t + 1].double()
                weights = (keys @ query[b, h, t].double() / math.sqrt(size)).softmax(0)
                out[b, h, t] = weights @ value[b, h // group, : past + t + 1].double()
    return out


@pytest.mark.parametrize(("time", "past"), [(7, 0), (1, 6), (3, 4)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("limit", [0, MAX_MATMUL_ATTENTION_LENGTH])
def test_attention_is_that_of_the_definition(
    time: int, past: int, kv_heads: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storylab.model.attention.MAX_MATMUL_ATTENTION_LENGTH", limit)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, time, 8, generator=generator)
    key = torch.randn(2, kv_heads, time + past, 8, generator=generator)
    value = torch.randn(2, kv_heads, time + past, 8, generator=generator)
    expected = brute_force_attention(query, key, value)
    ours = causal_attention(query, key, value).double()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 15, 19])
@pytest.mark.parametrize(
    "cut", [ChunkSizes(16, 10, 1), ChunkSizes(16, 2**31, 8)], ids=["cpu", "cuda"]
)
def test_head_loss_and_gradients_equal_plain_cross_entropy(
    count: int, cut: ChunkSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a vocabulary that is padded, as on a GPU."""
    monkeypatch.setattr(head, "chunk_sizes", lambda device: cut)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, 8, generator=generator, dtype=torch.float64).float()
    weight = torch.randn(31, 8, generator=generator)
    targets = torch.randint(31, (count,), generator=generator)
    a = [t.clone().requires_grad_() for t in (hidden, weight)]
    b = [t.double().requires_grad_() for t in (hidden, weight)]
    ours = linear_cross_entropy(*a, targets)
    logits = b[0] @ b[1].T
    plain = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(ours.double(), plain, rtol=1e-6, atol=1e-6)
    (ours * 0.3).backward()
    (plain * 0.3).backward()
    for mine, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
    each = F.cross_entropy(logits.detach(), targets, reduction="none")
    ours_each = token_losses(hidden, weight, targets).double()
    torch.testing.assert_close(ours_each, each, rtol=1e-5, atol=1e-6)


def test_the_loss_of_a_word_held_for_impossible_is_finite() -> None:
    """Its probability is 0 in float32, its logarithm is not."""
    hidden = torch.tensor([[500.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([2]))
    loss.backward()
    assert loss.item() == 1000.0 and hidden.grad is not None and hidden.grad.item() == 2.0


def test_head_under_autocast_stays_near_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 64, generator=generator)
    weight = (torch.randn(1000, 64, generator=generator) * 0.1).requires_grad_()
    targets = torch.randint(1000, (600,), generator=generator)
    exact = linear_cross_entropy(hidden, weight, targets) / 600
    (expected,) = torch.autograd.grad(exact, weight)
    with torch.autocast("cpu", torch.bfloat16):
        low = linear_cross_entropy(hidden, weight, targets) / 600
    (grad,) = torch.autograd.grad(low, weight)
    assert abs((low - exact).item()) < 2e-3
    assert float((grad - expected).norm() / expected.norm()) < 1e-2


def with_options() -> Transformer:
    """A model with every option on, whose added scales are not where they begin."""
    config = dataclasses.replace(SHAPES[1], **OPTIONS)
    model = Transformer(config, VOCAB, seed=2)
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


@pytest.fixture(params=["plain", "options"])
def any_model(request: pytest.FixtureRequest) -> Transformer:
    plain = request.param == "plain"
    return Transformer(SHAPES[1], VOCAB, seed=2) if plain else with_options()


def test_every_option_adds_what_is_counted_and_leaves_the_rest_as_it_begins() -> None:
    plain = dict(Transformer(SHAPES[1], VOCAB, seed=4).named_parameters())
    for name, value in OPTIONS.items():
        config = dataclasses.replace(SHAPES[1], **{name: value})
        model = Transformer(config, VOCAB, seed=4)
        parameters = dict(model.named_parameters())
        assert sum(p.numel() for p in parameters.values()) == config.parameter_count(VOCAB)
        for key, old in plain.items():
            assert torch.equal(parameters[key], old)


def test_gradients_of_every_option_are_those_without_redoing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x, y = with_options(), tokens(2, 9), tokens(2, 9, seed=1)
    redone = torch.autograd.grad(model(x, y), list(model.parameters()))
    monkeypatch.setattr("storylab.model.recompute.recomputes_activations", lambda x: False)
    kept = torch.autograd.grad(model(x, y), list(model.parameters()))
    for (name, _), one, other in zip(model.named_parameters(), redone, kept, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 0, name


def test_every_option_changes_the_logits() -> None:
    model = with_options()
    x = tokens(2, 9)
    logits = model(x)
    for name in OPTIONS:
        plain = {name: getattr(SHAPES[1], name)}
        other = Transformer(dataclasses.replace(model.config, **plain), VOCAB)
        other.load_state_dict(model.state_dict(), strict=False)
        assert not torch.allclose(other(x), logits), name


def test_no_option_lets_later_tokens_through(any_model: Transformer) -> None:
    x, changed = tokens(2, 12), tokens(2, 12)
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    before, after = any_model(x), any_model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7], after[:, 7])


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


def test_weights_that_are_of_no_use_are_told_of() -> None:
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_a_compiled_block_keeps_its_linear_layers_results_only() -> None:
    config = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_hidden=96)
    batch, time = 3, 16
    model, stream = Transformer(config, VOCAB), torch.randn(batch, time, config.n_embd)
    rotary = rope_cos_sin(config, torch.arange(time))
    torch._dynamo.reset()
    for block in model.blocks:  # the division of work that a compiler makes, without its code
        block.compile(backend="aot_eager_decomp_partition")
    kept: Counter[tuple[int, ...]] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tuple(tensor.shape)] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for block in model.blocks:
            stream, _ = block(stream, rotary)
    torch._dynamo.reset()
    rows = batch * time
    products = [(rows, config.qkv_size), (rows, config.n_embd), (rows, 2 * config.n_hidden)]
    assert all(kept.pop(shape) == config.n_layer for shape in products)
    # And the stream that enters each block. What is left is small, such as the rotary angles.
    assert kept.pop((batch, time, config.n_embd)) == config.n_layer
    assert all(math.prod(shape) <= time * config.head_size for shape in kept)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_gradients_of_compiled_blocks_are_those_of_plain_ones() -> None:
    model, x, y = with_options(), tokens(2, 9), tokens(2, 9, seed=1)
    plain = torch.autograd.grad(model(x, y), list(model.parameters()))
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager_decomp_partition")
    compiled = torch.autograd.grad(model(x, y), list(model.parameters()))
    torch._dynamo.reset()
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.skipif(missing_for_compiling("cpu") is not None, reason="nothing here compiles C++")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_softmax_in_one_kernel_is_the_softmax(dtype: torch.dtype) -> None:
    """A GPU's, here by the CPU's compiler: against float64, in rows that are a part of padded ones."""
    generator = torch.Generator().manual_seed(0)
    padded = (4 * torch.randn(40, 320, generator=generator)).to(dtype)
    logits, targets = padded.narrow(1, 0, 300), torch.randint(300, (40,), generator=generator)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = head._losses_in_one_kernel(logits, targets, gradient=True)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 5e-3, "atol": 1e-6}
    torch.testing.assert_close(logits.double(), gradient, **close)
