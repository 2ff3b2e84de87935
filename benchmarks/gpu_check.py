"""Prove storylab on a GPU and measure its speed there, in one call of some ten minutes.

    python gpu_check.py --out DIR            from the repository's root, on the machine with the card
    python gpu_check.py --out DIR --device cpu --preset nano      to see that the script itself works

Each step is a separate process with its own time limit. Its findings are appended to DIR/results.jsonl as
soon as they are known, so a step that fails or is cut off loses none. The steps run in the order of their
worth; when --seconds are over, the rest is named and left out. DIR/summary.txt holds the last lines that
are printed, DIR/log.txt all output. Files are written to DIR and to --work only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path.cwd()


# ----------------------------------------------------------------------------- the steps' surroundings


class Here:
    """The arguments and the surroundings of every step."""

    def __init__(self, args):
        self.args = args
        self.out, self.work = Path(args.out).resolve(), Path(args.work).resolve()
        self.cuda = args.device.startswith("cuda")
        self.preset = args.preset
        self.step = args.step
        # The micro-batch of the original log; on a CPU something that takes no time.
        self.sequences = 64 if self.cuda else 2
        self.block = 128 if self.cuda else 32
        self.accumulate = 16 if self.cuda else 2
        self.data = self.work / "data"
        self.started = time.perf_counter()

    def record(self, name, **values):
        """Write down one finding, at once."""
        row = {"step": self.step, "name": name, "at": round(time.perf_counter() - self.started, 1)}
        row |= plain(values)
        with open(self.out / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print("RESULT", json.dumps(row), flush=True)

    @contextlib.contextmanager
    def part(self, name):
        """A part of a step whose failure is a finding and does not stop the parts after it."""
        begin = time.perf_counter()
        try:
            yield
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            traceback.print_exc()
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.record(
                name,
                failed=f"{type(error).__name__}: {str(error)[:600]}",
                where=f"{Path(where.filename).name}:{where.lineno}",
            )
            del error
            with contextlib.suppress(Exception):
                free()  # what an allocation failed for
        finally:
            print(f"-- {self.step}/{name}: {time.perf_counter() - begin:.1f} s", flush=True)

    def config(self, method="record", **changes):
        """The run of the original log on this device."""
        from storylab.config import preset_config

        config = preset_config(self.preset, method)
        model = changes.pop("model", {})
        values = {
            "device": self.args.device,
            "data_dir": self.data,
            "batch_size": self.sequences,
            "gradient_accumulation_steps": self.accumulate,
            "block_size": self.block,
            "compile": False,
            "eval_iters": 2,
            "eval_interval": 10**6,
            "log_interval": 10,
            "warmup_iters": 1000 if method == "record" else config.warmup_iters,
        }
        values |= changes
        model = dataclasses.replace(config.model, **model)
        return dataclasses.replace(config, model=model, **values)

    def dataset(self):
        from storylab.data.dataset import load_dataset

        return load_dataset(self.data)

    def learner(self, method="record", vocab=None, **changes):
        from storylab.training.setup import resolve_device
        from storylab.training.state import TrainState

        config, precision = resolve_device(self.config(method, **changes))
        return TrainState(config, vocab or self.vocab(), precision)

    def vocab(self):
        return json.loads((self.data / "manifest.json").read_text())["tokenizer"]["vocab_size"]

    def batch(self, sequences, block=None):
        """Windows of the data, ``[sequences, block + 1]`` int64, on the device."""
        from storylab.data.batches import TrainingBatches

        data = self.dataset()
        make = TrainingBatches(
            data.splits["train"], data.fingerprint, 1337, block or self.block, sequences
        )
        return make(0).to(self.args.device)

    def sync(self):
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def seconds(self, work, repeats=10, warm=2):
        """Median seconds of ``work``, each waited for."""
        for _ in range(warm):
            work()
        found = []
        for _ in range(repeats if self.cuda else min(repeats, 2)):
            self.sync()
            begin = time.perf_counter()
            work()
            self.sync()
            found.append(time.perf_counter() - begin)
        return statistics.median(found)

    def queued(self, work, repeats=20, warm=3):
        """Seconds of ``work`` on the card when many are queued, by its own clock."""
        import torch

        if not self.cuda:
            return self.seconds(work, 2, 1)
        for _ in range(warm):
            work()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    def peak(self, reset=False):
        import torch

        if not self.cuda:
            return None
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return None
        return torch.cuda.max_memory_allocated() / 1e9


def plain(value):
    """As JSON has it, figures short."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return None if not math.isfinite(value) else float(f"{value:.6g}")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def relative(ours, right):
    """Norm of the difference over the norm of what is right; NaN counts as infinite."""
    ours, right = ours.detach().double().cpu(), right.detach().double().cpu()
    found = float((ours - right).norm() / right.norm().clamp(min=1e-30))
    return found if math.isfinite(found) else 1e9


FAMILY = (
    ("embedding", r"embedding"),
    ("qkv", r"qkv"),
    ("out", r"attention\.out"),
    ("gate_up", r"gate_up"),
    ("down", r"down"),
    ("scales", r"scale"),
    ("norms", r"norm"),
)


def by_family(names_and_errors):
    worst = {}
    for name, error in names_and_errors:
        family = next((f for f, rule in FAMILY if re.search(rule, name)), "other")
        worst[family] = max(worst.get(family, 0.0), error)
    return worst


def free(*_):
    """Give cached memory back between the parts of a step."""
    import gc

    import torch

    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------- the steps


def environment(here):
    """This machine, its software, and the two ceilings."""
    import platform

    import torch

    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    names = (
        "torch",
        "triton",
        "torchao",
        "liger-kernel",
        "cut-cross-entropy",
        "transformers",
        "tyro",
        "numpy",
        "tiktoken",
        "safetensors",
        "nvidia-ml-py",
        "nvidia-cudnn-cu13",
        "nvidia-cublas",
        "transformer-engine",
        "pytest",
        "hypothesis",
        "storylab",
    )
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    here.record(
        "software",
        python=platform.python_version(),
        cores=os.cpu_count(),
        packages={name: version(name) for name in names},
        compiler=os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        cpp=shutil.which("g++") or shutil.which("c++"),
        python_header=header.exists(),
        tf32=torch.backends.cuda.matmul.allow_tf32,
        float32_precision=torch.get_float32_matmul_precision(),
        cpu=torch.backends.cpu.get_cpu_capability(),
    )
    if not here.cuda:
        return
    with here.part("nvidia-smi"):
        query = (
            "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.sm,temperature.gpu"
        )
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        here.record("nvidia-smi", answer=answer.stdout.strip(), error=answer.stderr.strip()[:200])
    with here.part("card"):
        card = torch.cuda.get_device_properties(0)
        here.record(
            "card",
            gpu=card.name,
            capability=f"{card.major}.{card.minor}",
            gb=card.total_memory / 1e9,
            sms=card.multi_processor_count,
            l2_mb=card.L2_cache_size / 2**20,
            cudnn=torch.backends.cudnn.version(),
            cuda=torch.version.cuda,
            uuid=str(card.uuid),
        )
    with here.part("ceilings"):
        source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy = 2 * 2**31 / here.queued(lambda: target.copy_(source), 10)
        del source, target
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        bf16 = 2 * 8192**3 / here.queued(lambda: a @ b, 15)
        fp8 = None
        with here.part("fp8 ceiling"):
            one = torch.ones((), device="cuda")
            low, other = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
            fp8 = (
                2
                * 8192**3
                / here.queued(
                    lambda: torch._scaled_mm(
                        low,
                        other,
                        scale_a=one,
                        scale_b=one,
                        out_dtype=torch.bfloat16,
                        use_fast_accum=True,
                    ),
                    15,
                )
            )
        here.record(
            "ceilings",
            copy_tb_s=copy / 1e12,
            bf16_tflops=bf16 / 1e12,
            fp8_tflops=fp8 and fp8 / 1e12,
        )
    with here.part("telemetry"):
        from storylab.training.telemetry import PowerTotals, Telemetry

        with Telemetry(torch.device(here.args.device), PowerTotals()) as telemetry:
            begin = time.perf_counter()
            while time.perf_counter() - begin < 2.3:
                a @ b
                torch.cuda.synchronize()
            calls = here.seconds(lambda: telemetry.latest(), 20)
            here.record(
                "telemetry",
                **telemetry.means(),
                samples=len(telemetry.samples),
                seconds_of_a_reading=calls,
            )
    with here.part("which attention"):
        from torch.nn.attention import SDPBackend

        order = [SDPBackend(i).name for i in torch._C._get_sdp_priority_order()]
        q = torch.randn(64, 12, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        k = torch.randn(64, 3, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        train = SDPBackend(torch._fused_sdp_choice(q, k, k, None, 0.0, True, enable_gqa=True)).name
        mask = torch.ones(1, 20, dtype=torch.bool, device="cuda")
        q1, k1 = q[:1, :, :1].detach(), k[:1, :, :20].detach()
        decode = SDPBackend(
            torch._fused_sdp_choice(q1, k1, k1, mask, 0.0, False, enable_gqa=True)
        ).name
        q32, k32 = q.float(), k.float()
        wide = SDPBackend(
            torch._fused_sdp_choice(q32, k32, k32, None, 0.0, True, enable_gqa=True)
        ).name
        here.record("which attention", order=order, training=train, decoding=decode, float32=wide)


def correct(here):
    """Loss and gradients against float32 on the CPU, same weights and windows."""
    import torch

    from storylab.model.transformer import Transformer
    from storylab.training.precision import ComputePolicy

    device, cpu = torch.device(here.args.device), torch.device("cpu")
    batch = here.batch(8 if here.cuda else 2).cpu()
    tokens, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    wide, low = torch.float32, torch.bfloat16

    def gradients(model_config, where, dtype, compiled=False):
        model = Transformer(model_config, here.vocab(), seed=1337).to(where)
        if compiled:
            model.compile_blocks()
        with ComputePolicy(where, dtype).autocast():
            loss = model(tokens.to(where), targets.to(where))
        loss.backward()
        found = {n: p.grad.detach().float().cpu() for n, p in model.named_parameters()}
        stance = torch.compiler.set_stance("force_eager")
        with stance, ComputePolicy(where, dtype).autocast():
            evaluated = float(model.token_losses(tokens.to(where), targets.to(where)).mean())
        return float(loss), evaluated, found

    window = max(here.block // 2, 16)
    kinds = {
        "record": here.config().model,
        "fast": here.config("fast").model,
        "window": here.config(model={"attention": f"window:{window}*2,full"}).model,
        "narrow stream": here.config(model={"residual_dtype": "bfloat16"}).model,
    }
    for kind, model_config in kinds.items():
        with here.part(kind):
            right, right_evaluated, reference = gradients(model_config, cpu, wide)
            rows = {"bfloat16": (low, False), "float32": (wide, False), "compiled": (low, True)}
            if (
                kind != "record"
            ):  # compiling takes long; other steps compare compiled losses with these
                del rows["compiled"]
            if not here.cuda:
                rows = {"bfloat16": (low, False)}
            for name, (dtype, compiled) in rows.items():
                with here.part(f"{kind} {name}"):
                    loss, evaluated, found = gradients(model_config, device, dtype, compiled)
                    errors = [(n, relative(found[n], g)) for n, g in reference.items()]
                    here.record(
                        f"{kind} {name}",
                        loss=loss,
                        cpu_float32=right,
                        difference=loss - right,
                        evaluation_minus_cpu=evaluated - right_evaluated,
                        worst_gradient_error=max(e for _, e in errors),
                        by_family=by_family(errors),
                    )
                    free()


def no_sync(here):
    """Does anything in a step make the host wait? torch raises where it does."""
    import torch

    batch = here.batch(2 * here.sequences)
    cases = {
        "adamw": ("record", {}),
        "adamw compiled": ("record", {"compile": True}),
        "fast": ("fast", {}),
    }
    for name, (method, changes) in cases.items():
        with here.part(name):
            learner = here.learner(method, **changes)
            for _ in range(2):
                learner.step(0, batch, 1e-4)
            here.sync()
            waits = None
            if here.cuda:
                torch.cuda.set_sync_debug_mode("error")
            try:
                begin = time.perf_counter()
                result = learner.step(0, batch, 1e-4)
                host = time.perf_counter() - begin
            except RuntimeError as error:
                waits = (
                    str(error)[:200]
                    + " | "
                    + "".join(traceback.format_exc().splitlines()[-8:])[:600]
                )
            finally:
                if here.cuda:
                    torch.cuda.set_sync_debug_mode("default")
            if waits:
                here.record(name, waits=waits)
            else:
                here.sync()
                both = time.perf_counter() - begin
                here.record(
                    name, waits=None, host_ms=1e3 * host, all_ms=1e3 * both, loss=result.read().loss
                )
            del learner
            free()


def timed_methods(times):
    """Let the slow methods of a run say how long they took."""
    from storylab.training.checkpointing import Checkpoints
    from storylab.training.evaluator import Evaluator

    for owner, name in ((Checkpoints, "save_last"), (Evaluator, "evaluate"), (Evaluator, "_whole")):
        method = getattr(owner, name)

        def wrapped(self, *args, _method=method, _name=name, **kwargs):
            begin = time.perf_counter()
            result = _method(self, *args, **kwargs)
            times[_name].append(time.perf_counter() - begin)
            return result

        setattr(owner, name, wrapped)


class Quiet:
    """A reporter that prints lines and can send this process a SIGTERM on the way."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at

    def start(self, folder):
        pass

    def row(self, row):
        pass

    def end(self, summary):
        pass

    def line(self, text):
        print(text, flush=True)

    def progress(self, name, done, total):
        if name == "training" and done == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


def real_run(here, compiled, **changes):
    """The original log's configuration through ``train()`` itself."""
    from storylab.training import evaluator, train

    times = defaultdict(list)
    timed_methods(times)
    evaluator.SAMPLE_PROMPTS = evaluator.SAMPLE_PROMPTS[:1]
    iterations = 30 if here.cuda else 4
    config = here.config(
        out_dir=here.work / f"run-{here.step}",
        max_iters=iterations - 1,
        compile=compiled,
        eval_interval=(iterations - 10 if compiled else 10**6) if here.cuda else 2,
        log_interval=5,
        **changes,
    )
    shutil.rmtree(config.out_dir, ignore_errors=True)
    begin = time.perf_counter()
    run = train.train(config, Quiet())
    seconds = time.perf_counter() - begin
    from storylab.record.run import load_run

    loaded = load_run(run.folder)
    rows, summary = loaded.iterations, loaded.results
    settled = [row.tokens_per_second for row in rows[len(rows) // 3 :]]
    here.record(
        "run",
        compiled=compiled,
        tokens_per_second=statistics.median(settled),
        best_tokens_per_second=max(settled),
        step_seconds=[row.step_seconds for row in rows],
        losses=[row.loss for row in rows],
        grad_norms=[row.grad_norm for row in rows][:5],
        waited_for_data=statistics.median(row.data_seconds for row in rows),
        peak_gb=summary.peak_memory_bytes / 1e9,
        power_watts=summary.power_watts,
        utilisation=summary.utilization_percent,
        energy_joules=summary.energy_joules,
        whole_validation=summary.validation.loss,
        seconds=seconds,
        **{f"seconds{name}": values for name, values in times.items()},
    )
    log = (run.folder / "log.txt").read_text().splitlines()
    here.record("first line", line=next((line for line in log if line.startswith("iter 0")), None))


def train_eager(here):
    real_run(here, False)


def train_compiled(here):
    real_run(here, True)


def compile_proof(here):
    """Cost and findings of the check of compiled code before the first step."""
    from storylab.training.compile_check import check_compiled

    presets = ("nano", here.preset) if here.cuda else ("nano",)
    for preset in dict.fromkeys(presets):
        for method in ("record", "fast"):
            with here.part(f"{preset} {method}"):
                here.preset = preset
                learner = here.learner(method, compile=True)
                batch = here.batch(here.sequences)
                here.peak(reset=True)
                first = check_compiled(learner, batch)
                after = here.peak()
                again = check_compiled(learner, batch)
                here.record(
                    f"{preset} {method}",
                    seconds=first.seconds,
                    again_seconds=again.seconds,
                    share=first.share,
                    worst=first.worst,
                    passed=first.passed,
                    loss=first.loss,
                    loss_uncompiled=first.loss_uncompiled,
                    peak_gb=after,
                )
                del learner
                free()


def deterministic(here):
    """Cost of deterministic kernels where flash attention has several blocks."""
    import torch

    block = 512 if here.cuda else 64
    sequences = max(here.sequences * here.block // block, 1)
    for pattern in ("full", "window:64*3,full"):
        for wanted in (False, True):
            with here.part(f"{pattern}, {wanted}"):
                learner = here.learner(
                    block_size=block,
                    batch_size=sequences,
                    compile=True,
                    model={"attention": pattern},
                )
                torch.use_deterministic_algorithms(wanted, warn_only=True)
                batch = here.batch(2 * sequences, block)
                took = here.seconds(lambda: learner.step(0, batch, 0.0), 8)
                grads = []
                for _ in range(4):
                    learner.step(0, batch, 0.0)
                    grads.append([p.grad.clone() for p in learner.model.parameters()])
                same = all(all(map(torch.equal, grads[0], other)) for other in grads[1:])
                here.record(
                    f"{pattern}, deterministic {wanted}",
                    ms=1e3 * took,
                    same_bits=same,
                    tokens_per_second=2 * sequences * block / took,
                )
                del learner, grads
                free()
    torch.use_deterministic_algorithms(False)


def hidden_run(here):
    """One small run in a separate process, for :func:`bits`; the environment says which."""
    from storylab.errors import Interrupted
    from storylab.record import checkpoint
    from storylab.record.schema import IterationRow
    from storylab.training import evaluator, train
    from storylab.training.resume import resume

    spec = json.loads(os.environ["GPU_CHECK_RUN"])
    evaluator.SAMPLE_PROMPTS = evaluator.SAMPLE_PROMPTS[:1]
    folder = Path(spec["folder"])
    changes = dict(spec["changes"])
    reporter = Quiet(spec.get("stop_at"))
    try:
        if spec.get("resume"):
            run = resume(folder, None, reporter)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            run = train.train(here.config(out_dir=folder, **changes), reporter)
    except Interrupted as stop:
        print("INTERRUPTED", stop, flush=True)
        return
    tensors, _ = checkpoint.load(run.checkpoint("last"))
    rows = [row for row in run.read_rows() if isinstance(row, IterationRow)]
    losses, norms = [row.loss for row in rows], [row.grad_norm for row in rows]
    found = {"losses": losses, "norms": norms, "sha256": checkpoint.weights_sha256(tensors)}
    print("RUN", json.dumps(found), flush=True)


def bits(here, **changes):
    """The same bits again, and across a stop and a resume? Every run in its own process."""
    iterations = 6 if here.cuda else 4
    # Two layers have every kernel that twelve have, and a checkpoint of half the size.
    common = {
        "gradient_accumulation_steps": 2,
        "max_iters": iterations - 1,
        "log_interval": 1,
        "warmup_iters": 2,
        "learning_rate": 1e-3,
        "model": {"n_layer": 2},
    } | changes

    def run(name, stop_at=None, again=False):
        spec = {
            "folder": str(here.work / f"{here.step}-{name}"),
            "changes": common,
            "stop_at": stop_at,
            "resume": again,
        }
        done = subprocess.run(
            [sys.executable, __file__, *passed(here.args), "--step", "hidden_run"],
            env=os.environ | {"GPU_CHECK_RUN": json.dumps(spec)},
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        print(done.stdout[-3000:], done.stderr[-3000:], flush=True)
        row = next((x for x in done.stdout.splitlines() if x.startswith("RUN ")), None)
        if row is None and "INTERRUPTED" not in done.stdout:
            raise RuntimeError(f"{name}: {(done.stderr.strip().splitlines() or ['?'])[-1][:300]}")
        return row and json.loads(row[4:])

    def compared(first, second):
        apart = [
            i
            for i, (a, b) in enumerate(zip(first["losses"], second["losses"], strict=False))
            if a != b
        ]
        return {
            "same_bits": first["sha256"] == second["sha256"],
            "first_loss_apart": apart[0] if apart else None,
            "losses": (first["losses"], second["losses"]),
            "norms_same": first["norms"] == second["norms"],
        }

    with here.part("two runs"):
        first, second = run("a"), run("b")
        here.record("two runs", **changes, **compared(first, second))
        with here.part("resumed"):
            run("c", stop_at=iterations // 2)
            here.record("resumed", **changes, **compared(first, run("c", again=True)))


def bits_eager(here):
    bits(here)


def bits_compiled(here):
    bits(here, compile=True)


def bits_long(here):
    """Longer sequences: more than one block of keys, whose sums an atomic addition may reorder."""
    block = 512 if here.cuda else 64
    bits(here, block_size=block, batch_size=max(here.sequences * here.block // block, 1))


def attention_backends(here):
    """Each of torch's attention kernels: time, the same bits again, and what a new shape costs."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = here.args.device
    dtype = torch.bfloat16
    kinds = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    lengths = (128, 512, 1024) if here.cuda else (32,)
    for time_ in lengths:
        batch = max(8192 // time_, 1) if here.cuda else 2
        q0 = torch.randn(batch, time_, 12, 64, device=device, dtype=dtype).transpose(1, 2)
        k0, v0 = (
            torch.randn(batch, time_, 3, 64, device=device, dtype=dtype).transpose(1, 2)
            for _ in "kv"
        )
        out0 = torch.randn(batch, time_, 12, 64, device=device, dtype=dtype).transpose(1, 2)
        for name, backend in kinds.items():
            if name == "math" and time_ > 512:
                continue
            with here.part(f"{name} {time_}"), sdpa_kernel(backend):
                q, k, v = (x.detach().requires_grad_() for x in (q0, k0, v0))

                def forward(q=q, k=k, v=v):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

                def both(q=q, k=k, v=v, forward=forward):
                    return torch.autograd.grad((forward(),), (q, k, v), (out0,))

                here.sync()
                begin = time.perf_counter()
                first = [g.clone() for g in both()]
                here.sync()
                new_shape = time.perf_counter() - begin
                same = all(
                    all(torch.equal(a, b) for a, b in zip(first, both(), strict=False))
                    for _ in range(8)
                )
                here.record(
                    f"{name} {time_}",
                    forward_ms=1e3 * here.queued(forward),
                    both_ms=1e3 * here.queued(both),
                    same_bits=same,
                    first_call_s=new_shape,
                )
    with here.part("decoding"):
        # One query and a growing history, as in sampling: is every length a new plan?
        for name in ("default", "flash", "efficient"):
            context = contextlib.nullcontext() if name == "default" else sdpa_kernel(kinds[name])
            with here.part(f"decoding {name}"), context, torch.no_grad():
                times = []
                for source in range(20, 28):
                    q = torch.randn(1, 12, 1, 64, device=device, dtype=dtype)
                    k = torch.randn(1, 3, source, 64, device=device, dtype=dtype)
                    mask = (
                        None
                        if name == "flash"
                        else torch.ones(1, source, dtype=torch.bool, device=device)
                    )
                    here.sync()
                    begin = time.perf_counter()
                    F.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True)
                    here.sync()
                    times.append(time.perf_counter() - begin)
                here.record(f"decoding {name}", seconds_of_each_new_length=times)


def sampling(here):
    """Tokens a second, at first and again, with a recorded step and with every step started by the host."""
    from unittest.mock import patch

    import torch

    from storylab.model import decoding
    from storylab.model.transformer import Transformer
    from storylab.training.precision import choose_precision
    from storylab.training.sampling import StoryModel

    precision = choose_precision(torch.device(here.args.device), "bfloat16")
    model = Transformer(here.config().model, here.vocab()).to(here.args.device)
    writer = StoryModel(model, here.dataset().tokenizer, here.block, precision)
    count = 100 if here.cuda else 8
    stories = {}
    for name, reader in (
        ("recorded step", decoding.reader_of),
        ("growing cache", decoding.GrowingReader),
    ):
        with here.part(name), patch("storylab.model.generate.reader_of", reader):
            rates = []
            for _ in range(2):
                begin = time.perf_counter()
                ids = [int(c) for c in writer.ids("Once upon a time there was", None, count)]
                rates.append(len(ids) / (time.perf_counter() - begin))
            stories[name] = ids
            here.record(name, tokens_per_second=rates[0], again=rates[1], tokens=len(ids))
    first, second = stories.values()
    here.record("ids in common", of=len(first), same=sum(map(int.__eq__, first, second)))


KERNELS = (
    ("attention", r"flash|fmha|sdpa|flex_attention|attention"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|splitK|gemv|cublas"),
    ("optimizer", r"multi_tensor|[Aa]dam|lerp|LpNorm"),
    ("softmax", r"[Ss]oft[Mm]ax"),
    ("norms", r"[Rr]ms|layer_norm|LayerNorm|GammaBeta"),
    ("embedding", r"embedding|sort|Sort|unique|scan|Scan|segment|index"),
    ("compiled reductions", r"triton_(red|per)"),
    ("compiled elementwise", r"triton_poi"),
    ("reductions", r"reduce"),
    ("copies and casts", r"copy|[Mm]emcpy|[Mm]emset|cat|Cat|fill|Fill"),
    ("elementwise", r"elementwise"),
)


# Marks that the profiler shows on the card next to the kernels within them.
ANNOTATION = re.compile(
    r"Optimizer\.|ProfilerStep|## |Torch-Compiled|Compiled|LinearCross|autograd::|Pregraph"
)


def kernel_family(name):
    return next((family for family, rule in KERNELS if re.search(rule, name)), "other")


def profile(here):
    """Where a micro-batch's time goes on the card, by families of kernels, and how many are started."""
    import torch

    for name, changes in {
        "eager": {},
        "compiled": {"compile": True},
        "fast compiled": {"compile": True, "method": "fast"},
    }.items():
        with here.part(name):
            method = changes.pop("method", "record")
            learner = here.learner(method, **changes)
            one, two = here.batch(here.sequences), here.batch(2 * here.sequences)
            alone = here.seconds(lambda: learner.step(0, one, 1e-4))
            double = here.seconds(lambda: learner.step(0, two, 1e-4))
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if here.cuda else []
            with torch.profiler.profile(activities=kinds) as found:
                learner.step(0, two, 1e-4)
                here.sync()
            times, counts, kernels = Counter(), Counter(), Counter()
            for event in found.events() or ():
                if event.device_type.name == "CUDA" and not ANNOTATION.match(event.name):
                    took = event.time_range.elapsed_us()
                    times[kernel_family(event.name)] += took
                    counts[kernel_family(event.name)] += 1
                    kernels[event.name[:90]] += took
            here.record(
                name,
                micro_batch_ms=1e3 * (double - alone),
                update_ms=1e3 * (2 * alone - double),
                two_micro_batches_and_update_ms=1e3 * double,
                busy_ms=sum(times.values()) / 1e3,
                started=sum(counts.values()),
                ms={k: v / 1e3 for k, v in times.most_common()},
                kernels=dict(counts.most_common()),
                longest={k: round(v / 1e3, 3) for k, v in kernels.most_common(22)},
                peak_gb=here.peak(),
            )
            with here.part(f"{name}: the project's own shares"):
                from storylab.training.measure import StepTimer

                if name != "fast compiled":
                    timer = StepTimer(learner.config, here.vocab())
                    timer.state, timer.model = learner, learner.model
                    here.record(f"{name}: the project's own shares", **timer.shares(here.sequences))
            del learner
            free()


def brute_force(query, key, value, window):
    """Every score in float64, with a mask."""
    import torch

    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = query.double() @ key.transpose(2, 3) / query.shape[3] ** 0.5
    ahead = torch.arange(query.shape[2], device=query.device)
    apart = ahead[:, None] - ahead[None, :]
    hidden = (apart < 0) | (
        (apart >= window) if window else torch.zeros_like(apart, dtype=torch.bool)
    )
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value


def windows(here):
    """Windows as the project computes them: right, the same again, and how fast; FlexAttention beside."""
    import torch

    from storylab.config import FULL, Window
    from storylab.model import attention, attention_cuda

    device = torch.device(here.args.device, 0) if here.cuda else torch.device("cpu")
    cases = ((128, 64), (512, 64), (512, 128), (1024, 128), (1024, 256), (64, 32))
    for time_, window in cases if here.cuda else ((64, 16),):
        with here.part(f"{time_}, window {window}"):
            batch = max(8192 // time_, 1) if here.cuda else 2
            base = [
                torch.randn(batch, time_, heads, 64, device=device, dtype=torch.bfloat16).transpose(
                    1, 2
                )
                for heads in (12, 3, 3, 12)
            ]
            *inputs, direction = base
            inputs = [x.detach().requires_grad_(here.cuda) for x in inputs]
            pattern = Window(window)
            with torch.autocast(device.type, torch.bfloat16):
                (mask,) = attention_cuda.cuda_masks([pattern], base[0].transpose(1, 2), 64)

            def work(inputs=inputs, pattern=pattern, mask=mask, direction=direction):
                out = attention.causal_attention(*inputs, pattern, mask)
                return out, (torch.autograd.grad((out,), inputs, (direction,)) if here.cuda else ())

            begin = time.perf_counter()
            out, grads = work()
            here.sync()
            compiling = time.perf_counter() - begin
            few = [x.detach()[:2].double().requires_grad_(here.cuda) for x in inputs]
            right = brute_force(*few, window)
            errors = {"output": relative(out[:2], right)}
            if here.cuda:
                wanted = torch.autograd.grad((right,), few, (direction[:2].double(),))
                errors |= {
                    n: relative(g[:2], w) for n, g, w in zip("qkv", grads, wanted, strict=False)
                }
            again = work()[1]
            full = [x.detach().requires_grad_(here.cuda) for x in inputs]

            def flash(full=full, direction=direction):
                out = attention.causal_attention(*full, FULL, None)
                return torch.autograd.grad((out,), full, (direction,)) if here.cuda else out

            def band(inputs=inputs, pattern=pattern, direction=direction):
                out = attention.causal_attention(*inputs, pattern, None)
                return torch.autograd.grad((out,), inputs, (direction,)) if here.cuda else out

            if here.cuda:
                with here.part(f"{time_}, window {window}: FlexAttention"):
                    blocks = attention_cuda._block_mask(time_, pattern, device)

                    def flex(inputs=inputs, blocks=blocks, direction=direction):
                        out = attention.causal_attention(*inputs, FULL, blocks)
                        return torch.autograd.grad((out,), inputs, (direction,))

                    here.record(
                        f"{time_}, window {window}: FlexAttention", ms=1e3 * here.queued(flex)
                    )
            here.record(
                f"{time_}, window {window}",
                kernel=type(mask).__name__,
                errors=errors,
                first_call_s=compiling,
                same_bits=all(torch.equal(a, b) for a, b in zip(grads, again, strict=False)),
                ms=1e3 * here.queued(work),
                full_attention_ms=1e3 * here.queued(flash),
                band_or_mask_ms=1e3 * here.queued(band, 5),
            )
    block = 512 if here.cuda else 32
    sequences = max(here.sequences * here.block // block, 1)
    for name, pattern in (("full", "full"), ("windows", "window:64*3,full")):
        for compiled in (False, True) if here.cuda else (False,):
            with here.part(f"model, {name}, compiled {compiled}"):
                learner = here.learner(
                    block_size=block,
                    batch_size=sequences,
                    compile=compiled,
                    model={"attention": pattern},
                )
                batch = here.batch(sequences, block)
                begin = time.perf_counter()
                learner.step(0, batch, 1e-4)
                here.sync()
                first = time.perf_counter() - begin
                took = here.seconds(lambda: learner.step(0, batch, 1e-4), 8)
                here.record(
                    f"model, {name}, compiled {compiled}",
                    first_s=first,
                    ms=1e3 * took,
                    tokens_per_second=sequences * block / took,
                    loss=learner.step(0, batch, 0.0).read().loss,
                )
                del learner
                free()


def micro_batches(here):
    """The same iteration cut into fewer, larger micro-batches."""
    for compiled in (True, False):
        for sequences in (64, 256, 512) if here.cuda else (2, 4):
            with here.part(f"{sequences}, compiled {compiled}"):
                learner = here.learner(batch_size=sequences, compile=compiled)
                batch = here.batch(1024 if here.cuda else 4)
                here.peak(reset=True)
                took = here.seconds(lambda: learner.step(0, batch, 1e-4), 2, 1)
                here.record(
                    f"{sequences}, compiled {compiled}",
                    iteration_ms=1e3 * took,
                    tokens_per_second=batch[:, 1:].numel() / took,
                    peak_gb=here.peak(),
                )
                del learner
                free()


def kinds_of_steps(here):
    """Methods, precisions and residual streams: finite, how fast, and what an update takes."""
    cases = {
        "record compiled": ("record", {"compile": True}),
        "narrow stream compiled": (
            "record",
            {"compile": True, "model": {"residual_dtype": "bfloat16"}},
        ),
        "fast": ("fast", {}),
        "fast compiled": ("fast", {"compile": True}),
        "float16": ("record", {"dtype": "float16"}),
        "float16 compiled": ("record", {"dtype": "float16", "compile": True}),
        "float32": ("record", {"dtype": "float32"}),
        "muon": ("record", {"optimizer": "muon"}),
    }
    for name, (method, changes) in cases.items():
        with here.part(name):
            learner = here.learner(method, max_iters=100, **changes)
            batch, one = here.batch(4 * here.sequences), here.batch(here.sequences)
            begin = time.perf_counter()
            losses = [learner.step(i, batch, 1e-3).read().loss for i in range(5)]
            first = time.perf_counter() - begin
            took = here.seconds(lambda: learner.step(5, batch, 1e-3), 4, 1)
            alone = here.seconds(lambda: learner.step(5, one, 1e-3), 4, 1)
            micro = (took - alone) / 3
            here.record(
                name,
                losses=losses,
                five_steps_s=first,
                tokens_per_second=batch[:, 1:].numel() / took,
                micro_batch_ms=1e3 * micro,
                update_ms=1e3 * (alone - micro),
                peak_gb=here.peak(),
                scale=learner.scaler.get_scale() if learner.scaler.is_enabled() else None,
            )
            del learner
            free()


def low_precision(here):
    """FP8: the products alone, and the layers of native and torchao in the project's model."""
    import torch

    model = here.config().model
    tokens = here.sequences * here.block
    shapes = {
        "qkv": (model.n_embd, model.qkv_size),
        "out": (model.n_embd, model.n_embd),
        "gate_up": (model.n_embd, 2 * model.n_hidden),
        "down": (model.n_hidden, model.n_embd),
        "head": (model.n_embd, 50304),
    }
    if here.cuda:
        for name, (inner, outer) in shapes.items():
            with here.part(f"products, {name}"):
                one = torch.ones((), device="cuda")
                x = torch.randn(tokens, inner, device="cuda", dtype=torch.bfloat16)
                w = torch.randn(outer, inner, device="cuda", dtype=torch.bfloat16)
                low_x, low_w = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
                bf16 = here.queued(lambda x=x, w=w: x @ w.T, 30)
                fp8 = here.queued(
                    lambda a=low_x, b=low_w: torch._scaled_mm(
                        a,
                        b.T,
                        scale_a=one,
                        scale_b=one,
                        out_dtype=torch.bfloat16,
                        use_fast_accum=True,
                    ),
                    30,
                )
                flops = 2 * tokens * inner * outer
                here.record(
                    f"products, {name}",
                    bf16_tflops=flops / bf16 / 1e12,
                    fp8_tflops=flops / fp8 / 1e12,
                    faster=bf16 / fp8,
                )
    backends = ["native"]
    if not here.cuda:
        here.record("FP8 layers", left_out="needs a card")
        return
    if importlib.util.find_spec("torchao"):
        backends.append("torchao")
    else:
        here.record("torchao", left_out="not installed")
    for backend in backends:
        for dtype in ("fp8-current", "fp8-rowwise"):
            low_precision_layers(here, backend, dtype)


def low_precision_layers(here, backend, dtype):
    """A backend's layers in the project's model: self-test, then steps uncompiled and compiled."""
    from storylab.precision import selftest

    name = f"{dtype} by {backend}"
    with here.part(name):
        learner = here.learner(dtype=dtype, backend=backend, compile=None)
        checks = selftest.check_model(
            learner.model.blocks, learner.precision.recipe, learner.precision.hardware
        )
        found = selftest.summarize(checks)
        batch = here.batch(4 * here.sequences)
        took = here.seconds(lambda: learner.step(0, batch, 1e-4), 4)
        here.record(
            name,
            low=found["low"],
            products=found["products"],
            largest_distance=found["largest_distance_from_emulation"],
            tokens_per_second=batch[:, 1:].numel() / took,
            peak_gb=here.peak(),
        )
        with here.part(f"{name}, compiled"):
            learner.model.compile_blocks()
            took = here.seconds(lambda: learner.step(0, batch, 1e-4), 4, 3)
            here.record(
                f"{name}, compiled",
                tokens_per_second=batch[:, 1:].numel() / took,
                loss=learner.step(0, batch, 0.0).read().loss,
            )
        del learner
        free()


def plain_llama(config, vocab, device):
    """The original log's model as anyone would write it, for a comparison: whole and plain."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.n1, self.n2 = (nn.RMSNorm(config.n_embd, 1e-5) for _ in range(2))
            self.qkv = nn.Linear(config.n_embd, config.qkv_size, bias=False)
            self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)
            self.gate_up = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=False)
            self.down = nn.Linear(config.n_hidden, config.n_embd, bias=False)

        def forward(self, x, cos, sin):
            b, t, c = x.shape
            heads = self.qkv(self.n1(x)).view(b, t, -1, c // config.n_head)
            q, k, v = heads.split((config.n_head, config.n_kv_head, config.n_kv_head), 2)

            def turn(z):
                return (
                    z * cos
                    + torch.cat((-z[..., z.shape[-1] // 2 :], z[..., : z.shape[-1] // 2]), -1) * sin
                )

            q, k = turn(q).transpose(1, 2), turn(k).transpose(1, 2)
            y = F.scaled_dot_product_attention(
                q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True
            )
            x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
            gate, up = self.gate_up(self.n2(x)).chunk(2, -1)
            return x + self.down(F.silu(gate) * up)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(vocab, config.n_embd)
            self.blocks = nn.ModuleList(Block() for _ in range(config.n_layer))
            self.norm = nn.RMSNorm(config.n_embd, 1e-5)
            self.apply(
                lambda m: (
                    nn.init.normal_(m.weight, std=0.02)
                    if hasattr(m, "weight") and m.weight.dim() > 1
                    else None
                )
            )

        def forward(self, tokens, targets):
            t, d = tokens.shape[1], config.head_size
            angles = torch.arange(t, device=tokens.device).float()[:, None] * 10000.0 ** (
                -torch.arange(d // 2, device=tokens.device).float() / (d // 2)
            )
            angles = torch.cat((angles, angles), -1)[:, None]
            x = self.embedding(tokens).bfloat16()  # a 16-bit residual stream, as is usual
            cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
            for block in self.blocks:
                x = block(x, cos, sin)
            logits = F.linear(self.norm(x), self.embedding.weight)
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return Model().to(device)


def peers(here):
    """Other programs of the same shape, compiled whole: 4 micro-batches and an update, as ours."""
    import torch

    device, vocab, model_config = here.args.device, here.vocab(), here.config().model
    batch = here.batch(4 * here.sequences)
    tokens, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def measure(name, model, loss_of):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step():
            for x, y in zip(
                tokens.split(here.sequences), targets.split(here.sequences), strict=False
            ):
                with torch.autocast(torch.device(device).type, torch.bfloat16):
                    loss = loss_of(x, y) / 4
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        here.peak(reset=True)
        begin = time.perf_counter()
        loss = 4 * float(step())
        first = time.perf_counter() - begin
        took = here.seconds(step, 6)
        here.record(
            name,
            tokens_per_second=tokens.numel() / took,
            first_s=first,
            first_loss=loss,
            peak_gb=here.peak(),
        )

    for compiled in (False, True):
        with here.part(f"storylab, compiled {compiled}"):
            learner = here.learner(compile=compiled)
            begin = time.perf_counter()
            loss = learner.step(0, batch, 1e-4).read().loss
            first = time.perf_counter() - begin
            took = here.seconds(lambda learner=learner: learner.step(0, batch, 1e-4), 6)
            here.record(
                f"storylab, compiled {compiled}",
                first_s=first,
                first_loss=loss,
                tokens_per_second=tokens.numel() / took,
            )
            del learner
            free()
    with here.part("plain Llama, compiled whole"):
        torch.manual_seed(0)
        model = plain_llama(model_config, vocab, device)
        run = torch.compile(model, dynamic=False) if here.cuda else model
        measure("plain Llama, compiled whole", model, run)
        del model, run
        free()
    if importlib.util.find_spec("transformers"):
        for compiled in (True, False) if here.cuda else (False,):
            with here.part(f"transformers Llama, compiled {compiled}"):
                from transformers import LlamaConfig, LlamaForCausalLM

                torch.manual_seed(0)
                model = LlamaForCausalLM(
                    LlamaConfig(
                        vocab_size=vocab,
                        hidden_size=model_config.n_embd,
                        intermediate_size=model_config.n_hidden,
                        num_hidden_layers=model_config.n_layer,
                        num_attention_heads=model_config.n_head,
                        num_key_value_heads=model_config.n_kv_head,
                        max_position_embeddings=here.block,
                        rms_norm_eps=1e-5,
                        tie_word_embeddings=True,
                    )
                ).to(device)
                run = torch.compile(model, dynamic=False) if compiled else model
                measure(
                    f"transformers Llama, compiled {compiled}",
                    model,
                    lambda x, y, run=run: run(input_ids=x, labels=y, shift_labels=y).loss,
                )
                del model, run
                free()


def command_line(here):
    """The verbs that measure, as a person types them."""
    device = ["--device", here.args.device]
    small = [] if here.cuda else ["--batch_size", "2"]
    seconds = "8" if here.cuda else "1"
    calls = {
        "doctor": ["doctor", "--presets", "nano", here.preset, *device],
        "bench": [
            "bench",
            "--preset",
            here.preset,
            "--dtypes",
            "bfloat16",
            "float16",
            "--seconds",
            seconds,
            "--attentions",
            "window:64",
            *device,
            *small,
        ],
        "bench compiled": [
            "bench",
            "--preset",
            here.preset,
            "--dtypes",
            "bfloat16",
            "--seconds",
            seconds,
            "--attentions",
            "full",
            "--compile",
            *device,
            *small,
        ],
        "plan": ["plan", "--preset", here.preset, "--gpu", "h100", "this", *device, *small],
        "doctor --precision": ["doctor", "--precision", *device],
    }
    if not here.cuda:
        calls = {"doctor": [*calls["doctor"][:2], "nano", *device], "bench": calls["bench"]}
        calls["bench"] = [
            "bench",
            "--preset",
            "nano",
            "--dtypes",
            "bfloat16",
            "--seconds",
            "1",
            "--attentions",
            "full",
            *device,
            *small,
        ]
    for name, words in calls.items():
        with here.part(name):
            begin = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "storylab", *words],
                capture_output=True,
                text=True,
                timeout=150,
                check=False,
            )
            here.record(
                name,
                rc=done.returncode,
                seconds=time.perf_counter() - begin,
                out=done.stdout.splitlines(),
                error=done.stderr.strip()[-800:],
            )


def small_models(here):
    """Where starting kernels is what takes the time: small presets, larger micro-batches, a CUDA graph."""
    import torch

    for preset in ("nano", "10m"):
        here.preset = preset
        for sequences, compiled in ((64, False), (64, True), (1024, False), (1024, True)):
            with here.part(f"{preset}, {sequences}, compiled {compiled}"):
                sequences = sequences if here.cuda else 2
                learner = here.learner(vocab=4096, batch_size=sequences, compile=compiled)
                batch = torch.randint(
                    4096, (1024 if here.cuda else 4, here.block + 1), device=here.args.device
                )
                took = here.seconds(
                    lambda learner=learner, batch=batch: learner.step(0, batch, 1e-4), 3, 1
                )
                here.record(
                    f"{preset}, {sequences}, compiled {compiled}",
                    tokens_per_second=batch[:, 1:].numel() / took,
                    iteration_ms=1e3 * took,
                )
                del learner
                free()
        if not here.cuda:
            continue
        with here.part(f"{preset}, CUDA graph of a micro-batch"):
            learner = here.learner(vocab=4096, batch_size=64, compile=True)
            model, precision = learner.model, learner.precision
            tokens = torch.randint(4096, (64, here.block), device="cuda")

            def micro(model=model, precision=precision, tokens=tokens):
                with precision.autocast():
                    loss = model(tokens, tokens)
                loss.backward()
                return loss

            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    micro()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                micro()
            plain_ms, graph_ms = here.queued(micro), here.queued(graph.replay)
            here.record(
                f"{preset}, CUDA graph of a micro-batch",
                ms=1e3 * plain_ms,
                as_graph_ms=1e3 * graph_ms,
            )
            del learner, graph
            free()


def own_tests(here):
    """The project's own tests of this path, under this machine's torch and Python."""
    files = ["tests/test_cuda.py", "tests/model"]
    if not here.cuda:
        files = files[:1]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--maxfail=8",
            "-x" if not here.cuda else "-q",
            *files,
        ],
        capture_output=True,
        text=True,
        timeout=140,
        check=False,
    )
    here.record(
        "pytest", rc=done.returncode, tail=done.stdout.splitlines()[-12:], error=done.stderr[-300:]
    )


# In the order of their worth: what it is, and its limit in seconds on a card.
STEPS = {
    "environment": (environment, 60),
    "correct": (correct, 110),
    "no_sync": (no_sync, 70),
    "train_compiled": (train_compiled, 130),
    "train_eager": (train_eager, 80),
    "bits_eager": (bits_eager, 90),
    "bits_compiled": (bits_compiled, 120),
    "profile": (profile, 80),
    "attention_backends": (attention_backends, 45),
    "sampling": (sampling, 70),
    "windows": (windows, 120),
    "micro_batches": (micro_batches, 90),
    "peers": (peers, 150),
    "kinds_of_steps": (kinds_of_steps, 100),
    "low_precision": (low_precision, 150),
    "bits_long": (bits_long, 90),
    "command_line": (command_line, 180),
    "small_models": (small_models, 100),
    "own_tests": (own_tests, 150),
    "compile_proof": (compile_proof, 100),
    "deterministic": (deterministic, 90),
}
HIDDEN = {"hidden_run": (hidden_run, 150)}


# ------------------------------------------------------------------------------------------ the parent


def passed(args):
    """The arguments that a step is called with."""
    return [
        "--out",
        str(args.out),
        "--work",
        str(args.work),
        "--device",
        args.device,
        "--preset",
        args.preset,
    ]


def prepared(args):
    """Environment of the steps: the package importable, with the metadata that it asks for; the data."""
    work = Path(args.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    paths = [str((ROOT / p).resolve()) for p in paths]
    if importlib.util.find_spec("storylab") is None:
        paths.insert(0, str(ROOT / "src"))
    environment_of = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get(
            "TORCHINDUCTOR_CACHE_DIR", str(work / "inductor")
        ),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(work / "triton")),
        "HF_HUB_OFFLINE": "1",
    }
    data = work / "data"
    if not (data / "manifest.json").exists():
        vocabulary = "gpt2" if args.device.startswith("cuda") else "bpe:512"
        stories = [] if args.device.startswith("cuda") else ["--builtin_stories", "400"]
        for tokenizer in (vocabulary, "bpe:4096"):
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "storylab",
                    "prepare",
                    "--source",
                    "builtin",
                    "--tokenizer",
                    tokenizer,
                    "--out",
                    str(data),
                    *stories,
                ],
                env=environment_of,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            if done.returncode == 0:
                break
            print(done.stdout[-500:], done.stderr[-1500:], flush=True)
            shutil.rmtree(data, ignore_errors=True)
    manifest = data / "manifest.json"
    known = json.loads(manifest.read_text()) if manifest.exists() else {}
    return environment_of, {
        "fingerprint": known.get("fingerprint"),
        "tokenizer": known.get("tokenizer"),
    }


def run_together(names, limit, args, environment_of):
    """Steps whose findings are no timings, all at once."""
    from concurrent.futures import ThreadPoolExecutor

    shared = environment_of | {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "4"}

    def one(name):
        with open(args.out / f"log-{name}.txt", "a", encoding="utf-8") as log:
            return run_step(name, limit, args, shared, log)

    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(one, names))


def run_step(name, limit, args, environment_of, log):
    """One step in its own process group, which is killed whole at the limit."""
    begin = time.perf_counter()
    command = [sys.executable, str(Path(__file__).resolve()), *passed(args), "--step", name]
    process = subprocess.Popen(
        command, env=environment_of, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        rc = process.wait(timeout=limit)
        state = "done" if rc == 0 else f"failed, exit {rc}"
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        state = f"cut off after {limit:.0f} s"
    return {
        "step": name,
        "name": "(step)",
        "state": state,
        "seconds": round(time.perf_counter() - begin, 1),
    }


# The parts of a finding that the summary shows, in this order and under these short names.
SHORT = {
    "failed": "FAILED",
    "where": "at",
    "waits": "waits",
    "tokens_per_second": "tok/s",
    "same_bits": "same bits",
    "first_loss_apart": "loss apart at",
    "difference": "loss-cpu",
    "worst_gradient_error": "gradient error",
    "micro_batch_ms": "micro-batch ms",
    "update_ms": "update ms",
    "busy_ms": "busy ms",
    "started": "kernels",
    "iteration_ms": "iteration ms",
    "ms": "ms",
    "as_graph_ms": "as graph ms",
    "host_ms": "host ms",
    "all_ms": "all ms",
    "both_ms": "both ms",
    "full_attention_ms": "full ms",
    "band_or_mask_ms": "band ms",
    "ms_of_4_micro_batches_and_update": "ms of 4+update",
    "first_s": "first s",
    "first_call_s": "first s",
    "again": "again",
    "seconds_of_each_new_length": "s",
    "errors": "errors",
    "peak_gb": "GB",
    "power_watts": "W",
    "waited_for_data": "data s",
    "copy_tb_s": "copy TB/s",
    "bf16_tflops": "bf16 TFLOP/s",
    "fp8_tflops": "fp8 TFLOP/s",
    "faster": "x",
    "gpu": "",
    "order": "order",
    "training": "training",
    "decoding": "decoding",
    "float32": "float32",
    "line": "",
    "low": "low",
    "products": "of",
    "scale": "scale",
    "rc": "exit",
    "left_out": "left out",
    "compiler": "cc",
    "python_header": "Python.h",
    "python": "python",
    "loss": "loss",
    "seconds": "s",
    "share": "share",
    "worst": "worst",
    "again_seconds": "again s",
}


def figure(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(figure(v) for v in value[:8]) + "]"
    if isinstance(value, dict):
        return " ".join(f"{k} {figure(v)}" for k, v in list(value.items())[:6])
    return str(value)[:110]


def summary(rows):
    """A line for each finding, short enough for the end of the output."""
    lines = []
    for row in rows:
        if row["name"] == "(step)":
            lines.append(f"== {row['step']}: {row['state']}, {row.get('seconds')} s")
            continue
        cells = [
            f"{word} {figure(row[key])}".strip()
            for key, word in SHORT.items()
            if row.get(key) is not None
        ]
        lines.append(f"  {row['step']}/{row['name']}: {'; '.join(cells) or 'see results.jsonl'}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/storylab-gpu-check"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="113m")
    parser.add_argument("--seconds", type=float, default=525.0, help="for all steps together")
    parser.add_argument("--only", default="", help="names of steps, with commas")
    parser.add_argument("--skip", default="")
    parser.add_argument("--together", default="", help="steps to run at once, after the first one")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.step:
        here = Here(args)
        try:
            (STEPS | HIDDEN)[args.step][0](here)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            here.record(
                "(whole)",
                failed=f"{type(error).__name__}: {str(error)[:600]}",
                where=f"{Path(where.filename).name}:{where.lineno}",
            )
            raise
        return
    begin = time.perf_counter()
    results = args.out / "results.jsonl"
    environment_of, data = prepared(args)
    wanted = [
        n
        for n in (args.only.split(",") if args.only else STEPS)
        if n and n not in args.skip.split(",")
    ]
    if unknown := [name for name in wanted if name not in STEPS]:
        parser.error(f"no such steps: {unknown}; there are {', '.join(STEPS)}")

    def note(row):
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    note(
        {
            "step": "(parent)",
            "name": "data",
            "data": data,
            "seconds": round(time.perf_counter() - begin, 1),
        }
    )
    print("data:", data, flush=True)
    slower = 1 if args.device.startswith("cuda") else 4
    with open(args.out / "log.txt", "a", encoding="utf-8") as log:
        together = [n for n in args.together.split(",") if n]
        wanted = [n for n in wanted if n not in together]
        for place, name in enumerate(wanted):
            if together and place == 1:
                for row in run_together(together, 150 * slower, args, environment_of):
                    note(row)
                    print(f"{row['step']}: {row['state']}, {row['seconds']} s", flush=True)
                for each in sorted(args.out.glob("log-*.txt")):
                    log.write(f"\n===== {each.name}\n{each.read_text(errors='replace')}")
                    each.unlink()
                print(f"together: {time.perf_counter() - begin:.0f} s", flush=True)
            left = args.seconds - (time.perf_counter() - begin)
            if left < 12:
                note({"step": name, "name": "(step)", "state": "left out: no time"})
                continue
            log.write(f"\n===== {name}\n")
            log.flush()
            row = run_step(name, min(STEPS[name][1] * slower, left), args, environment_of, log)
            note(row)
            print(f"{row['step']}: {row['state']}, {row['seconds']} s", flush=True)
    rows = []
    for line in results.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    text = summary(rows)
    (args.out / "summary.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    # A log is often cut to its end, so the most valuable lines are printed last.
    for line in reversed([line[:150] for line in text]):
        print(line)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
