"""A program for torchrun: ``ranks_program.py PLAN.json`` carries out a plan on all of its processes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bad_batches import poisoned
from storylab.cli import main
from storylab.config import TrainConfig, from_dict
from storylab.data.batches import TrainingBatches
from storylab.data.dataset import load_dataset
from storylab.errors import Interrupted, UserError
from storylab.model.transformer import Transformer
from storylab.optim.orthogonal import _newton_schulz
from storylab.training.evaluation import evaluate_split
from storylab.training.loop import Loop
from storylab.training.parallel import joined, restarted
from storylab.training.precision import ComputePolicy
from storylab.training.ranks import Ranks
from storylab.training.resume import resume
from storylab.training.train import train

FLOAT32 = ComputePolicy(torch.device("cpu"), torch.float32)
STEP, ALL_REDUCE = Loop.step, dist.all_reduce
# Its name depends on the version of torch.
SCATTER_NAME = "reduce_scatter_" + ("single" if hasattr(dist, "all_gather_single") else "tensor")
SCATTER = getattr(dist, SCATTER_NAME)


def interfere(rank: int, step: dict[str, Any], reduced: list[list[Any]]) -> None:
    """Before the iteration ``at`` send this process the signal that the plan has for it, and note what that
    iteration sums over the ranks."""

    def interfering(loop: Loop, iteration: int) -> None:
        hit = iteration == step.get("at")
        if hit and step.get("signal") and rank == step["rank"] and not restarted():
            Path(step["clock"]).write_text(str(time.time()))
            os.kill(os.getpid(), step["signal"])

        def noting(tensor: Tensor, *args: Any, **options: Any) -> Any:
            reduced.append([str(tensor.dtype), tensor.numel()])
            return ALL_REDUCE(tensor, *args, **options)

        def noting_scattered(own: Tensor, whole: Tensor, *args: Any, **options: Any) -> Any:
            reduced.append(["scattered", whole.numel()])
            return SCATTER(own, whole, *args, **options)

        dist.all_reduce = noting if hit else ALL_REDUCE
        setattr(dist, SCATTER_NAME, noting_scattered if hit else SCATTER)
        STEP(loop, iteration)
        dist.all_reduce = ALL_REDUCE
        setattr(dist, SCATTER_NAME, SCATTER)

    Loop.step = interfering  # type: ignore[method-assign]


def poison(batches: Collection[int]) -> None:
    """Make the loss of these batches NaN in this process."""
    make, forward = poisoned(batches)
    TrainingBatches.__call__ = make  # type: ignore[method-assign]
    Transformer.forward = forward  # type: ignore[method-assign]


def carry_out(step: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    reduced: list[list[Any]] = []
    interfere(ranks.rank, step, reduced)
    poison(step.get("bad", ()) if ranks.rank else ())  # the first process learns of it by the sums
    try:
        if step["do"] == "train":
            train(from_dict(step["config"]), ranks=ranks)
        elif step["do"] == "resume":
            resume(Path(step["folder"]), ranks=ranks)
        elif step["do"] == "copy":
            if ranks.leads:
                shutil.copytree(step["from"], step["to"])
            ranks.any(False)
        elif step["do"] == "divide":
            stacks = [torch.randn(n, 24, 16, generator=torch.Generator()) for n in (1, 2, 5, 6)]
            pairs = [(ranks.divide(_newton_schulz, x), _newton_schulz(x)) for x in stacks]
            return {"equal": [torch.equal(*pair) for pair in pairs]}
        elif step["do"] == "evaluate":
            return evaluate(from_dict(step["config"]), ranks)
    except (Interrupted, UserError) as stop:
        return {"stopped": str(stop), "code": stop.exit_code, "ended": time.time()}
    return {"reduced": reduced}


def evaluate(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Whether divided and undivided evaluation are the same, and how many batches this rank did."""
    dataset = load_dataset(config.data_dir)
    model = Transformer(config.model, dataset.vocab_size, seed=1)
    split, size = dataset.splits["validation"], config.block_size
    alone = evaluate_split(model, split, size, FLOAT32)
    batches: list[int] = []
    losses, ticks = model.token_losses, []

    def counted(tokens: Tensor, targets: Tensor) -> Tensor:
        batches.append(len(tokens))
        return losses(tokens, targets)

    model.token_losses = counted  # type: ignore[method-assign]
    ranks.follow(model)
    with ranks.gathered(model):
        found = evaluate_split(
            model, split, size, FLOAT32, lambda done, total: ticks.append(done), ranks=ranks
        )
    same = (found.story_losses == alone.story_losses).all()
    same &= (found.position_losses == alone.position_losses).all()
    return {"same": bool(same), "windows": sum(batches), "ticks": len(ticks)}


def run_plan(plan: dict[str, Any]) -> None:
    out = Path(plan["out"])
    with joined("cpu", plan.get("parallel", "ddp")) as ranks:
        for name, step in plan["steps"].items():
            found = carry_out(step, ranks)
            (out / f"{name}.{ranks.rank}.json").write_text(json.dumps(found))
    left = threads_of_the_group()
    assert not left, f"these can abort the process at its end: {left}"


def threads_of_the_group() -> list[str]:
    """The names of this process's threads that belong to a process group of gloo, where /proc has them."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def run_command(step: dict[str, Any]) -> int:
    """The command line, as torchrun starts it, and starts it again."""
    rank = int(os.environ["RANK"])
    interfere(rank, step, [])
    code = main(step["command"])
    again = "again" if restarted() else "first"
    Path(step["out"], f"{again}.{rank}.json").write_text(
        json.dumps({"code": code, "ended": time.time()})
    )
    return code


if __name__ == "__main__":
    torch.set_num_threads(1)
    plan = json.loads(Path(sys.argv[1]).read_text())
    if "command" in plan:
        sys.exit(run_command(plan))
    run_plan(plan)
