"""The model against the Llama of `transformers`, and its properties shown by gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import HashStore
from torch.nn.parallel import DistributedDataParallel

from samples import TINY
from small_models import OPTIONS, SHAPES, VOCAB, tokens, with_options
from storylab.config import ModelConfig
from storylab.model.transformer import Transformer


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


def test_a_narrow_residual_stream_is_as_exact_as_llama_in_bfloat16() -> None:
    """Hidden states and gradients of the embedding against float64, next to the errors of Llama's."""
    config = dataclasses.replace(SHAPES[1], n_layer=12)
    model = Transformer(config, VOCAB, seed=3)
    with torch.no_grad():  # larger weights than at the start, so that every part matters
        for p in model.parameters():
            p.mul_(5.0 if p.dim() > 1 else 1.0)
    narrow = Transformer(dataclasses.replace(config, residual_dtype="bfloat16"), VOCAB)
    narrow.load_state_dict(model.state_dict())
    exact, rounded = llama(config, model).double(), llama(config, model).bfloat16()
    x = tokens(8, 24)
    direction = torch.randn(
        8, 24, config.n_embd, generator=torch.Generator().manual_seed(1)
    ).double()

    def error(hidden: Tensor, weight: Tensor, truth: tuple[Tensor, Tensor]) -> list[float]:
        (grad,) = torch.autograd.grad((hidden.double() * direction).sum(), weight)
        found = hidden.double().detach(), grad.double()
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]

    def states(other: torch.nn.Module) -> tuple[Tensor, Tensor]:
        hidden = other(input_ids=x, output_hidden_states=True).hidden_states[-1]
        return hidden, other.get_parameter("model.embed_tokens.weight")

    hidden, weight = states(exact)
    truth = hidden.detach(), torch.autograd.grad((hidden * direction).sum(), weight)[0]
    streams = []
    for block in narrow.blocks:
        block.register_forward_hook(lambda *call: streams.append(call[-1][0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        ours = error(narrow.hidden_states(x), narrow.embedding.weight, truth)
    theirs = error(*states(rounded), truth)
    assert streams == [torch.bfloat16] * 12
    for mine, other in zip(ours, theirs, strict=True):
        assert 1e-4 < mine < 1.2 * other
    # Without narrow products nothing is narrow.
    assert torch.equal(narrow.hidden_states(x), model.hidden_states(x))


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


def test_every_option_adds_what_is_counted_and_leaves_the_rest_as_it_begins() -> None:
    plain = dict(Transformer(SHAPES[1], VOCAB, seed=4).named_parameters())
    for name, value in OPTIONS.items():
        config = dataclasses.replace(SHAPES[1], **{name: value})
        model = Transformer(config, VOCAB, seed=4)
        parameters = dict(model.named_parameters())
        assert sum(p.numel() for p in parameters.values()) == config.parameter_count(VOCAB)
        for key, old in plain.items():
            assert torch.equal(parameters[key], old)


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
