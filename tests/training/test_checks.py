"""Each check before the first step: it passes on runs as they are, and notices a fault put into one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from samples import TINY, MakeConfig
from storylab.config import METHODS, ModelConfig
from storylab.config.patterns import AttentionPattern, Full, Window
from storylab.data.dataset import Dataset
from storylab.data.tokenizer import Tokenizer
from storylab.model import attention as kernels
from storylab.model.transformer import Transformer
from storylab.optim import orthogonal
from storylab.training.check import Check, Subject, model_parts
from storylab.training.checking import CHECKS
from storylab.training.checks import initial_loss, text
from storylab.training.observers import Observers
from storylab.training.setup import TrainingSetup, resolve_device

BY_NAME = {check.name: check for check in CHECKS}
MakeSubject = Callable[..., Subject]


@pytest.fixture
def subject(dataset: Dataset, tiny_config: MakeConfig) -> MakeSubject:
    """A run of the tiny model before its first step; keywords change single values of its config."""

    def make(data: Dataset = dataset, **changes: Any) -> Subject:
        config, precision = resolve_device(tiny_config(compile=False, **changes))
        return Subject(TrainingSetup(config, data, precision), Observers())

    return make


def fault(name: str, run: Subject) -> str:
    """The fault that a check finds, which must apply; empty if it passes."""
    check: Check = BY_NAME[name]
    assert check.applies(run)
    return check.run(run).fault


RUNS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "normuon": {"optimizer": "normuon"},
    "fast": METHODS["fast"] | {"model": dataclasses.replace(TINY, **METHODS["fast"]["model"])},
    "windows": {"model": dataclasses.replace(TINY, attention="window:5,window:3")},
    "window and full": {"model": dataclasses.replace(TINY, attention="window:5,full")},
    "long windows": {
        "model": dataclasses.replace(TINY, attention="window:40"),
        "block_size": 200,
    },
    "one position": {"model": dataclasses.replace(TINY, attention="window:1")},
    "short": {"block_size": 1},
    "one window": {"batch_size": 1},
    "fp8": {"dtype": "fp8", "backend": "emulated", "min_lr": 0.0},
    "nvfp4": {"dtype": "nvfp4", "backend": "emulated"},
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS.keys())
def test_right_runs_pass_and_stay_as_they_are(
    subject: MakeSubject, changes: dict[str, Any]
) -> None:
    run = subject(**changes)
    state = run.setup.state
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    groups = [repr(o.param_groups) for o in state.optimizers]
    for check in CHECKS:
        if check.applies(run):
            finding = check.run(run)
            assert finding.text and not finding.fault, check.name
            state.model.zero_grad(set_to_none=True)
    after = state.tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not optimizer.state for optimizer in state.optimizers)
    assert groups == [repr(o.param_groups) for o in state.optimizers]


def test_checks_apply_where_there_is_something_to_check(subject: MakeSubject) -> None:
    def applying(run: Subject) -> set[str]:
        return {check.name for check in CHECKS if check.applies(run)}

    everywhere = {"token ids", "text", "initial loss", "gradients", "causality", "optimizer"}
    assert applying(subject()) == everywhere
    assert applying(subject(**RUNS["windows"])) == everywhere | {"attention patterns"}
    assert applying(subject(**RUNS["nvfp4"])) == everywhere | {"low precision"}
    assert applying(subject(block_size=1)) == everywhere - {"causality"}
    assert applying(subject(learning_rate=0.0, min_lr=0.0)) == everywhere - {"optimizer"}


def test_ids_beyond_the_vocabulary(subject: MakeSubject) -> None:
    run = subject()
    rows = run.setup.state.model.embedding.num_embeddings
    assert rows == 300
    run.setup.state.model.embedding = nn.Embedding(200, TINY.n_embd)
    assert "ids from" in fault("token ids", run) and "from 0 to 199" in fault("token ids", run)
    assert "prepare the data again" in fault("token ids", run)


def test_ids_of_another_tokenizer(subject: MakeSubject, dataset: Dataset) -> None:
    """The same tokens in another order."""
    other = Tokenizer("other", dataset.tokenizer.tokens[::-1])
    run = subject(dataclasses.replace(dataset, tokenizer=other))
    assert "does not decode to text" in fault("text", run)


def test_characters_that_a_window_cuts_are_text() -> None:
    data = "aé€😀b".encode()
    for first in range(len(data)):
        for end in range(first, len(data) + 1):
            found = text._text(data[first:end])
            assert found is not None and found in "aé€😀b"
    for wrong in (b"a\xffb", b"a\xc3b", b"a\x80b", b"\x80\x80\x80\x80", "é".encode() + b"\x80a"):
        assert text._text(wrong) is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("vocab", "model"),
    [
        (300, TINY),
        (2, TINY),
        (4096, ModelConfig(n_layer=4, n_head=4, n_kv_head=1, n_embd=128, n_hidden=300)),
        # So wide and so shallow that a token's own logit counts.
        (500, ModelConfig(n_layer=1, n_head=8, n_kv_head=1, n_embd=1024, n_hidden=16)),
    ],
)
def test_the_predicted_loss_is_that_of_drawn_weights(
    vocab: int, model: ModelConfig, seed: int
) -> None:
    """On random tokens, of which many repeat the one before. A prediction without the token's own logit
    would be off."""
    transformer = Transformer(model, vocab, seed=seed)
    draws = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (4, 64), generator=draws)
    targets = tokens.where(torch.rand(tokens.shape, generator=draws) < 0.3, tokens.roll(-1, 1))
    with torch.no_grad():
        loss = float(transformer(tokens, targets))
        states = transformer.hidden_states(tokens)
        own = (states * transformer.embedding(tokens)).sum(-1)
    expected, tolerance = initial_loss.predicted_loss(
        own, tokens == targets, targets, vocab, model.n_embd
    )
    assert abs(loss - expected) < tolerance / 2
    if model.n_embd == 1024:
        assert abs(loss - math.log(vocab) - 0.02**2 * 1024 / 2) > tolerance


def test_the_tolerance_covers_the_draws_of_the_weights() -> None:
    """One deviation of the five is at least the spread over weights drawn 200 times, and at most three
    times as wide. Half of the targets are one token."""
    vocab, width = 1000, 64
    targets = torch.cat((torch.zeros(128, dtype=torch.int64), torch.arange(128)))
    errors, allowed = [], 0.0
    for seed in range(200):
        draws = torch.Generator().manual_seed(seed)
        rows = torch.randn(vocab, width, generator=draws) * 0.02
        # One state for all positions is the worst case.
        state = torch.randn(width, generator=draws)
        logits = rows @ (state / state.square().mean().sqrt())
        loss = (logits.logsumexp(0) - logits[targets]).mean()
        none = torch.full((256,), -math.inf)
        expected, allowed = initial_loss.predicted_loss(
            none, torch.zeros(256, dtype=torch.bool), targets, vocab, width
        )
        errors.append(float(loss) - expected)
    spread = float(torch.tensor(errors).std())
    assert 1 < (allowed / initial_loss.DEVIATIONS) / spread < 3


def unshifted(model: Transformer) -> None:
    forward = model.forward
    model.forward = lambda tokens, targets: forward(tokens, tokens)  # type: ignore[method-assign]


def summed(model: Transformer) -> None:
    forward = model.forward
    model.forward = lambda tokens, targets: forward(tokens, targets) * targets.numel()  # type: ignore[method-assign]


def scaled(factor: float) -> Callable[[Transformer], None]:
    def scale(model: Transformer) -> None:
        model.embedding.weight.data *= factor

    return scale


def without_norm(model: Transformer) -> None:
    model.norm.weight.data *= 10


@pytest.mark.parametrize("spoil", [unshifted, summed, scaled(8), without_norm])
def test_wrong_initial_losses(subject: MakeSubject, spoil: Callable[[Transformer], None]) -> None:
    wide = dataclasses.replace(TINY, n_embd=128)
    run = subject(model=wide, block_size=64)
    assert not fault("initial loss", run)
    spoil(run.setup.state.model)
    assert "loss of the initial weights is" in fault("initial loss", run)


def test_a_frozen_parameter(subject: MakeSubject) -> None:
    run = subject()
    run.setup.state.model.blocks[1].feed_forward_norm.weight.requires_grad_(False)
    found = fault("gradients", run)
    assert found.startswith("blocks.1.feed_forward_norm.weight has no gradient (it is frozen)")


def test_a_parameter_that_nothing_uses(subject: MakeSubject) -> None:
    run = subject()
    run.setup.state.model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    assert fault("gradients", run).startswith("spare has no gradient:")


def test_keys_that_are_left_out_of_the_graph(
    subject: MakeSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of the fused matrix is not zero then; only that of its rows is."""
    attend = kernels.causal_attention

    def detached(query: Any, key: Any, *others: Any) -> Any:
        return attend(query, key.detach(), *others)

    monkeypatch.setattr("storylab.model.transformer.causal_attention", detached)
    # 4 query heads and 2 key/value heads of 8 features.
    found = fault("gradients", subject())
    assert "blocks.0.attention.qkv.weight, rows 32 to 47 has a gradient of zero" in found


def test_gradients_that_are_not_finite(subject: MakeSubject) -> None:
    run = subject()
    run.setup.state.model.blocks[0].attention.out.weight.register_hook(lambda g: g * math.inf)
    assert fault("gradients", run).startswith(
        "blocks.0.attention.out.weight has a gradient that is not finite"
    )


@pytest.mark.parametrize("size", [16, 200])
def test_a_mask_that_looks_ahead(
    subject: MakeSubject, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(Full, "allows", lambda self, query, key: key <= query + 1)
    found = fault("causality", subject(block_size=size))
    place = size // 3 + 1
    # Both layers look one position ahead.
    assert f"position {place} on changes the state of position {place - 2}:" in found


def test_a_mean_over_the_whole_window(subject: MakeSubject) -> None:
    run = subject()
    run.setup.state.model.norm.register_forward_hook(
        lambda module, inputs, states: states - 1e-4 * states.mean(1, keepdim=True)
    )
    assert "changes the state of position 0" in fault("causality", run)


def with_patterns(
    monkeypatch: pytest.MonkeyPatch, other: Callable[[AttentionPattern], AttentionPattern]
) -> None:
    """Let the kernels compute other patterns than those of the config."""
    attend = kernels.causal_attention

    def wrong(query: Any, key: Any, value: Any, pattern: AttentionPattern, *others: Any) -> Any:
        return attend(query, key, value, other(pattern), *others)

    monkeypatch.setattr("storylab.model.transformer.causal_attention", wrong)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (lambda p: Window(p.size + 1), "layer 1 (window of 5): position 5 reads position 0"),
        (lambda p: Window(p.size - 1), "layer 1 (window of 5): position 4 does not read position 0"),
        (lambda p: Full(), "layer 1 (window of 5): position 5 reads position 0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [9, 16, 100])
def test_windows_that_are_not_in_force(
    subject: MakeSubject,
    monkeypatch: pytest.MonkeyPatch,
    other: Callable[[Any], AttentionPattern],
    expected: str,
    dtype: str,
    size: int,
) -> None:
    run = subject(
        model=dataclasses.replace(TINY, attention="window:5"), block_size=size, dtype=dtype
    )
    assert not fault("attention patterns", run)
    with_patterns(monkeypatch, other)
    assert fault("attention patterns", run).startswith(expected)


def test_a_full_layer_that_is_a_window(
    subject: MakeSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = subject(model=dataclasses.replace(TINY, attention="window:5,full"))
    with_patterns(monkeypatch, lambda pattern: Window(5))
    assert fault("attention patterns", run).startswith(
        "layer 2 (full attention): position 5 does not read position 0"
    )


def test_a_path_around_the_windows(subject: MakeSubject) -> None:
    """Each layer is right, and yet the last state knows the first token."""
    run = subject(model=dataclasses.replace(TINY, attention="window:3"))
    run.setup.state.model.blocks[1].register_forward_hook(
        lambda module, inputs, output: (output[0] + output[0][:, :1], *output[1:])
    )
    found = fault("attention patterns", run)
    assert found.startswith("the state of position 15 depends on positions 0 to 10, ")
    assert "together reach 5 positions" in found


class Forgetful(torch.optim.SGD):
    """Updates all parameters but those of a shape."""

    skips_where_found_inf = True
    forgotten: tuple[int, ...] = (32,)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.shape == self.forgotten:
                    parameter.grad = None
        super().step()


def test_an_optimizer_that_skips_parameters(subject: MakeSubject) -> None:
    run = subject()
    state = run.setup.state
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    state.optimizers = [Forgetful(state.model.parameters(), lr=0.1)]
    found = fault("optimizer", run)
    assert found.startswith("blocks.0.attention_norm.weight is not moved by a step; ")
    assert "(and 2 more)" in found
    assert all(torch.equal(p, before[name]) for name, p in state.model.named_parameters())
    assert not state.optimizers[0].state


def test_weight_decay_alone_is_no_update(subject: MakeSubject) -> None:
    run = subject()
    optimizer = run.setup.state.optimizers[0]
    step = optimizer.step

    def without_gradients() -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.zero_()
        step()

    optimizer.step = without_gradients  # type: ignore[method-assign, assignment]
    assert "embedding.weight is not moved by a step" in fault("optimizer", run)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("optimizer", ["adamw", "normuon"])
def test_parameters_in_the_wrong_number_of_groups(subject: MakeSubject, optimizer: str) -> None:
    run = subject(optimizer=optimizer)
    first = run.setup.state.optimizers[0].param_groups[0]["params"]
    last = first.pop()
    (name,) = (n for n, p in run.setup.state.model.named_parameters() if p is last)
    assert fault("optimizer", run).startswith(f"{name} is in 0 groups of the optimizers")
    first += [last, last]
    assert fault("optimizer", run).startswith(f"{name} is in 2 groups of the optimizers")


def test_a_group_whose_rate_is_zero(subject: MakeSubject) -> None:
    run = subject(optimizer="muon")
    run.setup.state.optimizers[0].param_groups[0]["lr_ratio"] = 0.0
    assert "attention.qkv.weight, rows 0 to 31 is not moved" in fault("optimizer", run)


def test_one_projection_of_a_fused_matrix_that_muon_forgets(
    subject: MakeSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = subject(optimizer="muon")
    update = orthogonal._update_same_shape

    def all_but_one(tensors: Any, *others: Any) -> None:
        update(tensors[:-1], *others) if len(tensors) > 1 else update(tensors, *others)

    assert not fault("optimizer", run)
    monkeypatch.setattr(orthogonal, "_update_same_shape", all_but_one)
    assert "is not moved by a step" in fault("optimizer", run)


def test_a_layer_that_was_not_quantized(subject: MakeSubject) -> None:
    run = subject(dtype="nvfp4", backend="emulated")
    block = run.setup.state.model.blocks[0].feed_forward
    plain = nn.Linear(TINY.n_hidden, TINY.n_embd, bias=False)
    plain.weight = block.down.weight
    block.down = plain
    assert "linear layers are quantized, and the recipe of nvfp4" in fault("low precision", run)


def test_parts_cover_every_element_once() -> None:
    model = Transformer(TINY, 300)
    count = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for part in model_parts(model, TINY):
        part.of(count[part.name.partition(",")[0]]).add_(1)
    assert all(bool((counted == 1).all()) for counted in count.values())
