"""storylab beside the programs that people train small language models with, on this machine's CPU.

    git clone https://github.com/karpathy/llama2.c && git clone https://github.com/karpathy/nanoGPT
    pip install litgpt accelerate
    python benchmarks/peers.py same --preset 113m --data_dir data/tinystories-gpt2
    python benchmarks/peers.py best --preset 10m --data_dir data/files-bpe4096 --seconds 120

``same`` is the same arithmetic: shape, initial weights, batches of real stories, AdamW, clipping. Every
program takes ``--steps`` steps in a process of its own, the programs in turns (A B C C B A ...); their
losses are shown so that they can be seen to agree before speed counts. ``best`` gives each the same wall
time, starting and compiling included, with its fastest settings and the same tuned peak learning rate,
and judges by bits per byte of the validation stories.

Models, losses and optimizers are the programs' own code, the loop around them is written here, as their
train.py has it; ``Trainer`` is the one of transformers, whole. nanoGPT and llama2.c use no autocast on a
CPU, whatever --dtype says: they are timed as they are (float32) and with bfloat16 autocast put around
their forward pass. nanoGPT's shape is GPT-2's, with as many layers of the same width, so compare its
FLOP/s, counted for all alike: 6 x matrix parameters (blocks and head) + 12 x layers x width x length a
token. What is not installed is left out and said to be.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
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
        from storylab.model.transformer import Transformer
        from storylab.training.allocator import keep_freed_memory
        from storylab.training.optimizers import build_optimizers
        from storylab.training.precision import choose_precision

        keep_freed_memory()
        config = preset_config(args.preset, method)
        if method == "record":  # with the peers' AdamW
            config = dataclasses.replace(config, beta2=0.95, learning_rate=args.learning_rate)
        self.peak = config.learning_rate
        self.model = Transformer(config.model, args.vocab_size, seed=0)
        if compiled:
            self.model.compile_blocks()
        self.precision = choose_precision(torch.device("cpu"), dtype)  # type: ignore[arg-type]
        self.optimizers = build_optimizers(self.model, config)
        self.scaler = self.precision.grad_scaler()

    def step(self, batch: Any, learning_rate: float) -> float:
        from storylab.training.step import training_step

        return (
            training_step(
                self.model,
                self.optimizers,
                self.scaler,
                self.precision,
                batch,
                micro_batch=len(batch),
                learning_rate=learning_rate,
                grad_clip=1.0,
            )
            .read()
            .loss
        )

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


def load(model: Any, named: dict[str, Any], names: dict[str, str], layers: int) -> None:
    """Put ``named`` weights into a peer's model; ``names`` has {i} for the layer."""
    state = {}
    for ours, theirs in names.items():
        for i in range(layers) if "{i}" in ours else [0]:
            state[theirs.format(i=i)] = named[ours.format(i=i)].clone()
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"output.weight", "lm_head.weight", "tok_embeddings.weight", "transformer.wte.weight"}
    assert not unexpected and set(missing) <= tied, (missing, unexpected)


def adamw(model: Any, args: argparse.Namespace) -> Any:
    """AdamW as storylab has it: matrices decay, gains do not."""
    import torch

    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))


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
    names = {"embedding": "tok_embeddings.weight", "norm": "norm.weight"}
    inside = {"q": "attention.wq", "k": "attention.wk", "v": "attention.wv", "o": "attention.wo",
              "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2",
              "norm1": "attention_norm", "norm2": "ffn_norm"}  # fmt: skip
    names |= {f"{{i}}.{k}": f"layers.{{i}}.{v}.weight" for k, v in inside.items()}
    load(model, named, names, shape.n_layer)
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
    names = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight"}
    inside = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
              "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
              "down": "mlp.down_proj", "norm1": "input_layernorm",
              "norm2": "post_attention_layernorm"}  # fmt: skip
    names |= {f"{{i}}.{k}": f"model.layers.{{i}}.{v}.weight" for k, v in inside.items()}
    load(model, named, names, shape.n_layer)
    run = torch.compile(model) if compiled else model
    return Program(
        model,
        lambda x, y: run(input_ids=x, labels=y, shift_labels=y).loss,
        adamw(model, args),
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
    names = {"embedding": "lm_head.weight", "norm": "transformer.ln_f.weight"}
    inside = {"qkv": "attn.qkv", "o": "attn.proj", "gate": "mlp.fc_1", "up": "mlp.fc_2",
              "down": "mlp.proj", "norm1": "norm_1", "norm2": "norm_2"}  # fmt: skip
    names |= {f"{{i}}.{k}": f"transformer.h.{{i}}.{v}.weight" for k, v in inside.items()}
    load(model, named, names, shape.n_layer)
    run = torch.compile(model) if compiled else model
    return Program(
        model,
        lambda x, y: chunked_cross_entropy(run(x), y, chunk_size=0),
        adamw(model, args),
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
    # It shifts labels by itself: the window's last token is left without a loss, which costs 1 in 128.
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


def batches_of(args: argparse.Namespace) -> Any:
    from storylab.data.batches import TrainingBatches
    from storylab.data.dataset import load_dataset

    dataset = load_dataset(args.data_dir)
    args.vocab_size = dataset.vocab_size
    make = TrainingBatches(dataset.splits["train"], dataset.fingerprint, 1, LENGTH, args.sequences)
    return dataset, make


def measure_same(name: str, args: argparse.Namespace) -> dict[str, float]:
    """One program's steps: median seconds without the first, its cost, memory and last loss."""
    import torch

    from storylab.training.telemetry import peak_memory_bytes

    _, make = batches_of(args)
    batches = [make(i) for i in range(args.steps)]
    if name.startswith("transformers Trainer"):
        times, losses, model = trainer_times(args, batches, True)
    else:
        program = PROGRAMS[name](args)
        model = program.model
        times, losses = [], []
        for batch in batches:
            begin = time.perf_counter()
            losses.append(program.step(batch, args.learning_rate))
            times.append(time.perf_counter() - begin)
    median = statistics.median(times[1:])
    shape, _ = start(args)
    positions = sum(p.numel() for n, p in model.named_parameters() if "wpe" in n)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - positions
    flops = 6 * matrices + 12 * shape.n_layer * shape.n_embd * LENGTH
    tokens = args.sequences * LENGTH
    return {
        "tokens_per_second": tokens / median,
        "gflops": flops * tokens / median / 1e9,
        "peak_gb": peak_memory_bytes(torch.device("cpu")) / 1e9,
        "start_seconds": times[0] - median,
        "loss": losses[-1],
    }


def measure_best(name: str, args: argparse.Namespace) -> dict[str, float]:
    """One program trained for the given wall time; its learning rate falls to zero at the end of it."""
    import torch

    from storylab.training.evaluation import evaluate_split
    from storylab.training.precision import Precision

    dataset, make = batches_of(args)
    begin = time.perf_counter()
    program = PROGRAMS[name](args)
    peak = getattr(program, "peak", args.learning_rate)
    count = 0
    while (progress := (time.perf_counter() - begin) / args.seconds) < 1:
        share = min(progress / args.warmup, (1 - progress) / (1 - args.warmup))
        program.step(make(count), peak * share)
        count += 1
    seconds = time.perf_counter() - begin
    precision = Precision(torch.device("cpu"), torch.float32)
    found = evaluate_split(program, dataset.splits["validation"], LENGTH, precision)  # type: ignore[arg-type]
    return {
        "bits_per_byte": found.bits_per_byte,
        "loss": found.loss,
        "tokens": count * args.sequences * LENGTH,
        "seconds": seconds,
    }


MEASURES = {"same": measure_same, "best": measure_best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=MEASURES)
    parser.add_argument("--preset", default="113m")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--llama2c", type=Path, default=Path("llama2.c"))
    parser.add_argument("--nanogpt", type=Path, default=Path("nanoGPT"))
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--warmup", type=float, default=0.1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--programs", nargs="*", default=list(PROGRAMS))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print("RESULT", json.dumps(MEASURES[args.table](args.only, args)))
        return
    names = []
    for name in args.programs:
        if installed(name, args):
            names.append(name)
        else:
            print(f"left out, not installed: {name}", file=sys.stderr)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(args.repeats):
        for name in names if turn % 2 == 0 else names[::-1]:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            rows = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not rows:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"turn {turn + 1}: {name} failed: {last}", file=sys.stderr, flush=True)
                continue
            results[name].append(json.loads(rows[0].removeprefix("RESULT ")))
            print(f"turn {turn + 1}: {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    (print_same if args.table == "same" else print_best)(results, args)


def median(rows: list[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows) if rows else math.nan


def print_same(results: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    base = next(iter(results.values()))
    rate = median(base, "gflops")
    print(
        f"| {args.preset}, {args.sequences} x {LENGTH} tokens | tok/s (min to max) | GFLOP/s | first "
        f"step more | peak memory | loss {args.steps} | speed per FLOP, first row's / its |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, rows in results.items():
        if not rows:
            print(f"| {name} | failed | | | | | |")
            continue
        speeds = [row["tokens_per_second"] for row in rows]
        print(
            f"| {name} | {statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f}) "
            f"| {median(rows, 'gflops'):,.0f} | {median(rows, 'start_seconds'):.1f} s "
            f"| {median(rows, 'peak_gb'):.2f} GB | {median(rows, 'loss'):.4f} "
            f"| {rate / median(rows, 'gflops'):.2f} |"
        )


def print_best(results: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    print(f"| {args.preset}, {args.seconds:g} s | tokens | loss, nats a token | bits per byte |")
    print("| --- | --- | --- | --- |")
    for name, rows in results.items():
        print(
            f"| {name} | {median(rows, 'tokens'):,.0f} | {median(rows, 'loss'):.4f} "
            f"| {median(rows, 'bits_per_byte'):.4f} |"
        )


if __name__ == "__main__":
    main()
