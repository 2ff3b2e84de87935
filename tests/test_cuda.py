"""The CUDA path as far as it can be proved without a card.

The model's forward pass is traced on fake CUDA tensors, which have a device, a shape and a dtype but no
values: whatever would make the host wait for one (item, float, bool, nonzero) raises, and so does an
operation across devices. Gradients cannot be traced like this without a CUDA build of torch: whole
steps run on the CPU, where what would wait is counted.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock, call

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from storylab.config import ModelConfig, TrainConfig
from storylab.errors import UserError
from storylab.model import decoding
from storylab.model.attention import causal_attention
from storylab.model.cache import StaticLayerCache
from storylab.model.transformer import Transformer
from storylab.record import checkpoint
from storylab.training.checkpointing import Saver
from storylab.training.precision import ComputePolicy, choose_device, require_same_bits
from storylab.training.state import TrainState
from storylab.training.step import DeviceStepMetrics

CUDA = torch.device("cuda")
BFLOAT16 = ComputePolicy(CUDA, torch.bfloat16)
VOCAB = 300
MODEL = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_hidden=96)
FAST = dataclasses.replace(
    MODEL,
    qk_norm=True,
    embedding_residual=True,
    value_residual="first_layer",
)


class Operations(TorchDispatchMode):
    """Counts what is called, and the elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names[str(function)] += 1
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    # Autocast would be switched off where torch has no card.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    with FakeTensorMode() as mode:
        yield mode


def on_the_card(model: Transformer) -> Transformer:
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, device=CUDA)))
    return model


@pytest.mark.parametrize("model_config", [MODEL, FAST], ids=["record", "fast"])
def test_a_forward_pass_stays_on_the_card(
    fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch, model_config: ModelConfig
) -> None:
    attention = Mock(wraps=F.scaled_dot_product_attention)
    # Its arguments decide which kernel a GPU takes.
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    model = on_the_card(Transformer(model_config, VOCAB))
    tokens = torch.zeros(4, 128, dtype=torch.int64, device=CUDA)
    with torch.no_grad(), BFLOAT16.autocast():
        hidden = model.hidden_states(tokens)
    assert hidden.device.type == "cuda"
    # torch's own kernel, one a layer, which a card runs without making the scores.
    assert attention.call_count == model_config.n_layer
    assert all(call.kwargs["is_causal"] for call in attention.call_args_list)
    with pytest.raises(RuntimeError):
        float(hidden.sum())  # so a read anywhere in the pass would have raised


@pytest.mark.parametrize("model_config", [MODEL, FAST], ids=["record", "fast"])
def test_attention_is_given_one_dtype(
    fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch, model_config: ModelConfig
) -> None:
    """Autocast on CUDA widens norms, and a windowed attention takes no mixture."""
    attention = Mock(side_effect=lambda query, *others: query)
    # Fake tensors cannot enter the kernel of windows; its arguments are what is tested.
    monkeypatch.setattr("storylab.model.transformer.causal_attention", attention)
    model = on_the_card(Transformer(model_config, VOCAB))
    with torch.no_grad(), BFLOAT16.autocast():
        model.hidden_states(torch.zeros(4, 128, dtype=torch.int64, device=CUDA))
    assert attention.call_count == model_config.n_layer
    for each in attention.call_args_list:
        assert [x.dtype for x in each.args[:3]] == [torch.bfloat16] * 3


def test_all_logits_are_never_in_memory() -> None:
    vocab, time, chunk = 3000, 2048, 1024
    model = Transformer(MODEL, vocab)
    tokens = torch.zeros(2, time, dtype=torch.int64)
    with Operations() as seen:
        model(tokens, tokens).backward()
    assert chunk * vocab <= seen.largest < 2 * time * vocab / 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "normuon"])
@pytest.mark.parametrize("model", [MODEL, FAST], ids=["record", "fast"])
def test_nothing_in_a_step_makes_the_host_wait_but_reading_its_result(
    monkeypatch: pytest.MonkeyPatch, model: ModelConfig, optimizer: str
) -> None:
    config = TrainConfig(
        model=model,
        optimizer=optimizer,  # type: ignore[arg-type]
        batch_size=4,
        ema_fraction=0.1,
    )
    learner = TrainState(config, VOCAB, ComputePolicy(torch.device("cpu"), torch.bfloat16))
    batch = torch.zeros(8, 33, dtype=torch.int64)

    def step() -> Counter[str]:
        with Operations() as seen:
            learner.step(0, batch, learning_rate=1e-3)
        return seen.names

    def refuse(self: torch.Tensor) -> None:
        raise AssertionError("the host waits")

    # What becomes a call that can be counted, and what does not.
    with Operations() as control:
        assert bool(torch.zeros(()) == 0)
    assert any("_local_scalar_dense" in name for name in control.names)
    for method in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, method, refuse)
    with pytest.raises(AssertionError, match="waits"):
        step()  # on a CPU it reads its result
    # All but the one read that is meant to wait.
    monkeypatch.setattr(DeviceStepMetrics, "read", lambda self: None)
    names = step()
    waits = ("_local_scalar_dense", "nonzero", "masked_select")
    assert not any(wait in name for name in names for wait in waits)
    fused = sum(count for name, count in names.items() if "_fused_adamw" in name)
    assert fused == 2  # what decays and what does not


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
@pytest.mark.parametrize("model", [MODEL, FAST], ids=["record", "fast"])
def test_a_block_is_one_graph(model: ModelConfig) -> None:
    """Compiled blocks have no graph break, and one graph serves all micro-batches of one shape."""
    network = Transformer(model, VOCAB)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    for block in network.blocks:
        block.compile(backend=backend, fullgraph=True)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    for _ in range(3):
        network(tokens, tokens).backward()
    # The layers differ in what they are given only where values are handed on.
    assert len(graphs) <= 2
    torch.compiler.reset()


def test_a_lone_query_takes_no_mask(fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention takes none; cuDNN's would build a plan for every length of the history."""
    attention = Mock(side_effect=lambda query, *others, **options: query)
    # Its arguments decide which kernel a GPU takes.
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    query = torch.empty(1, 4, 1, 64, device=CUDA)
    history = torch.empty(1, 2, 20, 64, device=CUDA)
    causal_attention(query, history, history)
    assert attention.call_args.kwargs == {"is_causal": False, "enable_gqa": True}


@pytest.mark.parametrize("model_config", [MODEL, FAST], ids=["record", "fast"])
def test_a_step_of_sampling_can_be_recorded(
    fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch, model_config: ModelConfig
) -> None:
    """It reads no value of a tensor, and what a replay reads stays where it is."""
    # A build of torch for CPUs cannot copy on a card, even where there are no values.
    monkeypatch.setattr(torch.Tensor, "copy_", lambda tensor, other: tensor)
    # Recording needs a card.
    monkeypatch.setattr(decoding, "record", lambda step, device: (lambda: None, step()))
    windows = dataclasses.replace(model_config, attention="window:16,full")
    model = on_the_card(Transformer(windows, VOCAB))
    reader = decoding.reader_of(model, 3, 64)
    assert isinstance(reader, decoding.GraphReader)
    one = torch.zeros(3, 1, dtype=torch.int64, device=CUDA)

    def stored() -> list[int]:
        caches = [cast(StaticLayerCache, layer) for layer in reader.cache.layers]
        held = [t for c in caches for t in (c.keys, c.values, c.length) if t is not None]
        return [id(tensor) for tensor in (*held, reader.cache.length, reader.token)]

    with torch.no_grad(), BFLOAT16.autocast():
        reader.read(one)
        before = stored()
        for _ in range(decoding.STEPS_BEFORE + 2):
            logits = reader.read(one)
        assert reader.recorded is not None
        reader.restart()
        reader.read(one)
    assert stored() == before and len(before) == 8
    assert logits.shape == (3, VOCAB) and logits.device.type == "cuda"


def test_a_step_is_recorded_on_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself torch records on a stream of the first card, and stays on it after a failure."""
    order: list[Any] = []

    @contextmanager
    def noted(*what: Any, **options: Any) -> Iterator[None]:
        order.append(options.get("stream", what[0]))
        yield
        order.append("end")

    second = torch.device("cuda", 1)
    # Nothing here has streams or graphs.
    monkeypatch.setattr(torch.cuda, "device", noted)
    monkeypatch.setattr(torch.cuda, "graph", noted)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    before = SimpleNamespace(device=second)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: before)
    monkeypatch.setattr(torch.cuda, "set_stream", order.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("stream of", device))
    decoding._stream.cache_clear()
    assert decoding.record(lambda: torch.ones(1), second) == ("replay", torch.ones(1))
    assert order == [second, ("stream of", second), "end", before, "end"]
    order.clear()
    with pytest.raises(RuntimeError, match="capturing"):
        decoding.record(Mock(side_effect=RuntimeError("capturing")), second)
    assert order[-1] is before
    decoding._stream.cache_clear()


def test_cudnn_attention_is_off_where_a_card_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    switched = Mock()
    # As on a machine with one GPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched)
    for name in ("auto", "cuda", "cuda:0"):
        choose_device(name)
    assert switched.call_args_list == [call(False)] * 3


@pytest.mark.parametrize(
    ("block_size", "head_size", "expected"),
    [(128, 64, False), (129, 64, True), (1024, 64, True), (64, 128, False), (128, 128, True)],
)
def test_bits_are_kept_where_flash_attention_has_several_blocks(
    monkeypatch: pytest.MonkeyPatch, block_size: int, head_size: int, expected: bool
) -> None:
    mode = Mock()
    monkeypatch.setattr(torch, "use_deterministic_algorithms", mode)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    require_same_bits(CUDA, block_size, head_size)
    mode.assert_called_once_with(expected)
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == expected
    require_same_bits(torch.device("cpu"), block_size, head_size)
    mode.assert_called_once()


def test_a_checkpoint_on_a_card_is_written_while_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state at the time of the call, whatever happens to the tensors after it."""
    order: list[str] = []
    event = SimpleNamespace(
        record=lambda: order.append("queued"), synchronize=lambda: order.append("copied")
    )
    # Nothing here has events or pinned memory.
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    empty_like = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda tensor, pin_memory, **options: empty_like(tensor, **options)
    )
    saver = Saver(CUDA)
    weight = torch.ones(3)
    for value in (1.0, 2.0):
        weight.fill_(value)
        saver.save(tmp_path / "last.safetensors", {"model.w": weight}, {"iteration": value})
        weight.fill_(-1.0)
        saver.wait()
        tensors, state = checkpoint.load(tmp_path / "last.safetensors")
        assert tensors["model.w"].tolist() == [value] * 3 and state == {"iteration": value}
    assert order == ["queued", "copied"] * 2
    saver.save(tmp_path / "missing" / "last.safetensors", {"model.w": weight}, {})
    with pytest.raises(UserError, match="cannot write"):
        saver.wait()  # a full disk, say, does not go unnoticed
    saver.close()
