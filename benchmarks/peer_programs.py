"""storylab and the programs it is compared with: each trains on a batch and evaluates tokens.

Models, losses and optimizers are the programs' own code; the loop around them is written here, as their
train.py has it. Those of the original log's architecture start from storylab's initial weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

LENGTH = 128


class Program:
    """A model with its optimizer behind what the loops here call."""

    def __init__(
        self,
        model: Any,
        loss: Callable[[Any, Any], Any],
        optimizer: Any,
        autocast: bool,
        logits: Callable[[Any], Any],
    ) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.autocast, self.logits = autocast, logits

    def context(self) -> Any:
        import torch

        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()

    def step(self, batch: Any, learning_rate: float) -> float:
        """The step of nanoGPT's and llama2.c's train.py with one micro-batch."""
        import torch

        x, y = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with self.context():
            loss = self.loss(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    def token_losses(self, tokens: Any, targets: Any) -> Any:
        import torch

        with torch.no_grad(), self.context():
            logits = self.logits(tokens)
        return torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), targets, reduction="none"
        )


class Storylab:
    """storylab, with its own step."""

    def __init__(self, args: argparse.Namespace, dtype: str, compiled: bool, method: str) -> None:
        import torch

        from storylab.config import preset_config
        from storylab.training.precision import choose_precision
        from storylab.training.state import TrainState

        config = preset_config(args.preset, method)
        self.warmup: float = args.warmup if config.warmup_iters else 0.0
        if method == "record":  # with the peers' AdamW
            config = dataclasses.replace(config, beta2=0.95, learning_rate=args.learning_rate)
        # ``best`` lets every rate fall to zero, where an average of the weights is of no use.
        changes = {"compile": compiled, "batch_size": args.sequences, "ema_fraction": 0.0}
        config = dataclasses.replace(config, seed=0, **changes)
        self.peak = config.learning_rate
        self.precision = choose_precision(torch.device("cpu"), dtype)  # type: ignore[arg-type]
        self.learner = TrainState(config, args.vocab_size, self.precision)
        self.model = self.learner.model

    def step(self, batch: Any, learning_rate: float) -> float:
        loss = self.learner.step(0, batch, learning_rate).read().loss
        assert loss is not None  # only a step that is skipped has none
        return loss

    def token_losses(self, tokens: Any, targets: Any) -> Any:
        import torch

        with torch.compiler.set_stance("force_eager"), self.precision.autocast():
            return self.model.token_losses(tokens, targets)


def start(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The shape, and storylab's initial weights in separate matrices under short names."""
    from storylab.config import preset_config
    from storylab.model.transformer import Transformer

    shape = preset_config(args.preset).model
    weights = Transformer(shape, args.vocab_size, seed=0).state_dict()
    kv = shape.n_kv_head * shape.head_size
    named = {"embedding": weights["embedding.weight"], "norm": weights["norm.weight"]}
    for i in range(shape.n_layer):
        block = f"blocks.{i}."
        named[f"{i}.q"], named[f"{i}.k"], named[f"{i}.v"] = weights[
            block + "attention.qkv.weight"
        ].split((shape.n_embd, kv, kv))
        named[f"{i}.o"] = weights[block + "attention.out.weight"]
        named[f"{i}.gate"], named[f"{i}.up"] = weights[block + "feed_forward.gate_up.weight"].chunk(
            2
        )
        named[f"{i}.down"] = weights[block + "feed_forward.down.weight"]
        named[f"{i}.norm1"] = weights[block + "attention_norm.weight"]
        named[f"{i}.norm2"] = weights[block + "feed_forward_norm.weight"]
    return shape, named


def load(
    model: Any,
    named: dict[str, Any],
    layers: int,
    outside: dict[str, str],
    block: str,
    inside: dict[str, str],
) -> None:
    """Put ``named`` weights into a peer's model, which has those ``inside`` its layers under ``block`` and
    the layer's number."""
    state = {f"{theirs}.weight": named[ours].clone() for ours, theirs in outside.items()}
    for i in range(layers):
        for ours, theirs in inside.items():
            state[f"{block}.{i}.{theirs}.weight"] = named[f"{i}.{ours}"].clone()
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"output.weight", "lm_head.weight", "tok_embeddings.weight", "transformer.wte.weight"}
    assert not unexpected and set(missing) <= tied, (missing, unexpected)


def adamw(model: Any, args: argparse.Namespace, fused: bool) -> Any:
    """AdamW where matrices decay and gains do not; ``fused`` as the program's own default has it."""
    import torch

    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=fused)


def llama2c(args: argparse.Namespace, autocast: bool, compiled: bool) -> Program:
    import torch

    sys.path.insert(0, str(args.llama2c))
    theirs = importlib.import_module("model")
    shape, named = start(args)
    model = theirs.Transformer(
        theirs.ModelArgs(
            dim=shape.n_embd,
            n_layers=shape.n_layer,
            n_heads=shape.n_head,
            n_kv_heads=shape.n_kv_head,
            vocab_size=args.vocab_size,
            hidden_dim=shape.n_hidden,
            max_seq_len=LENGTH,
            dropout=0.0,
        )
    )
    half = shape.head_size // 2
    for i in range(shape.n_layer):  # it turns neighbouring channels together
        for name in (f"{i}.q", f"{i}.k"):
            heads = named[name].view(-1, 2, half, shape.n_embd)
            named[name] = heads.transpose(1, 2).reshape(named[name].shape)
    outside = {"embedding": "tok_embeddings", "norm": "norm"}
    inside = {"q": "attention.wq", "k": "attention.wk", "v": "attention.wv", "o": "attention.wo",
              "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2",
              "norm1": "attention_norm", "norm2": "ffn_norm"}  # fmt: skip
    load(model, named, shape.n_layer, outside, "layers", inside)
    optimizer = model.configure_optimizers(0.1, args.learning_rate, (0.9, 0.95), "cpu")
    run = torch.compile(model) if compiled else model

    def loss(x: Any, y: Any) -> Any:
        run(x, y)
        return model.last_loss

    def logits(x: Any) -> Any:
        return model(x, torch.zeros_like(x))

    if compiled:  # the attribute is set inside of the graph

        def loss(x: Any, y: Any) -> Any:
            out = run(x, y)
            return torch.nn.functional.cross_entropy(out.view(-1, out.size(-1)), y.view(-1))

    return Program(model, loss, optimizer, autocast, logits)


def transformers(args: argparse.Namespace, autocast: bool, compiled: bool) -> Program:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, named = start(args)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=shape.n_embd,
            intermediate_size=shape.n_hidden,
            num_hidden_layers=shape.n_layer,
            num_attention_heads=shape.n_head,
            num_key_value_heads=shape.n_kv_head,
            max_position_embeddings=LENGTH,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    )
    outside = {"embedding": "model.embed_tokens", "norm": "model.norm"}
    inside = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
              "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
              "down": "mlp.down_proj", "norm1": "input_layernorm",
              "norm2": "post_attention_layernorm"}  # fmt: skip
    load(model, named, shape.n_layer, outside, "model.layers", inside)
    run = torch.compile(model) if compiled else model
    return Program(
        model,
        lambda x, y: run(input_ids=x, labels=y, shift_labels=y).loss,
        adamw(model, args, fused=True),
        autocast,
        lambda x: model(input_ids=x).logits,
    )


def litgpt(args: argparse.Namespace, autocast: bool, compiled: bool) -> Program:
    import torch
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    shape, named = start(args)
    model = GPT(
        Config(
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_query_groups=shape.n_kv_head,
            n_embd=shape.n_embd,
            head_size=shape.head_size,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=1e-5,
            mlp_class_name="LLaMAMLP",
            intermediate_size=shape.n_hidden,
            block_size=LENGTH,
            vocab_size=args.vocab_size,
            padded_vocab_size=args.vocab_size,
        )
    )
    model.transformer.wte.weight = model.lm_head.weight  # as its pretrain has it with tied weights
    for i in range(shape.n_layer):
        named[f"{i}.qkv"] = torch.cat([named[f"{i}.{n}"] for n in "qkv"])
    outside = {"embedding": "lm_head", "norm": "transformer.ln_f"}
    inside = {"qkv": "attn.qkv", "o": "attn.proj", "gate": "mlp.fc_1", "up": "mlp.fc_2",
              "down": "mlp.proj", "norm1": "norm_1", "norm2": "norm_2"}  # fmt: skip
    load(model, named, shape.n_layer, outside, "transformer.h", inside)
    run = torch.compile(model) if compiled else model
    return Program(
        model,
        lambda x, y: chunked_cross_entropy(run(x), y, chunk_size=0),
        adamw(model, args, fused=False),
        autocast,
        model,
    )


def nanogpt(args: argparse.Namespace, autocast: bool, compiled: bool) -> Program:
    import torch

    sys.path.insert(0, str(args.nanogpt))
    theirs = importlib.import_module("model")
    shape, _ = start(args)
    torch.manual_seed(0)
    model = theirs.GPT(
        theirs.GPTConfig(
            block_size=LENGTH,
            vocab_size=args.vocab_size,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_embd=shape.n_embd,
            dropout=0.0,
            bias=False,
        )
    )
    optimizer = model.configure_optimizers(0.1, args.learning_rate, (0.9, 0.95), "cpu")
    run = torch.compile(model) if compiled else model
    return Program(
        model,
        lambda x, y: run(x, y)[1],
        optimizer,
        autocast,
        lambda x: model(x, torch.zeros_like(x, memory_format=torch.contiguous_format))[0],
    )


def trainer_times(args: argparse.Namespace, batches: list[Any], autocast: bool) -> Any:
    """Seconds of the steps of transformers' Trainer, its losses, and its model."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    program = transformers(args, autocast, False)
    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter() - self.start)

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    windows = torch.cat(batches)
    # It shifts the labels: the window's last token is left without a loss, which costs 1 in 128.
    data = [{"input_ids": w[:-1], "labels": w[:-1]} for w in windows]
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=autocast,
        per_device_train_batch_size=len(batches[0]),
        max_steps=len(batches),
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    InOrder(program.model, settings, train_dataset=data, callbacks=[Clock()]).train()
    return times, losses, program.model


Make = Callable[[argparse.Namespace], Any]
PROGRAMS: dict[str, Make] = {
    "storylab bfloat16, compiled": lambda a: Storylab(a, "bfloat16", True, "record"),
    "storylab bfloat16": lambda a: Storylab(a, "bfloat16", False, "record"),
    "storylab float32": lambda a: Storylab(a, "float32", False, "record"),
    "storylab bfloat16, compiled, fast": lambda a: Storylab(a, "bfloat16", True, "fast"),
}
PEERS = {
    "llama2.c": llama2c,
    "litgpt": litgpt,
    "transformers Llama": transformers,
    "nanoGPT": nanogpt,
}
for _name, _make in PEERS.items():
    PROGRAMS[f"{_name}, autocast"] = lambda a, make=_make: make(a, True, False)
    PROGRAMS[f"{_name}, autocast, compiled"] = lambda a, make=_make: make(a, True, True)
    PROGRAMS[f"{_name}, float32"] = lambda a, make=_make: make(a, False, False)
PROGRAMS["transformers Trainer, bf16"] = lambda a: None


def installed(name: str, args: argparse.Namespace) -> bool:
    """Whether a program's code is there."""
    if name.startswith("llama2.c"):
        return (args.llama2c / "model.py").exists()
    if name.startswith("nanoGPT"):
        return (args.nanogpt / "model.py").exists()
    needed = {"litgpt": ["litgpt"], "transformers": ["transformers", "accelerate"]}
    modules = needed.get(name.split()[0].rstrip(","), [])
    return all(importlib.util.find_spec(module) for module in modules)
