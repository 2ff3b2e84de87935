"""Evaluate a llama2.c checkpoint on storylab's validation windows, as `storylab eval` does its own.

    git clone https://github.com/karpathy/llama2.c
    python benchmarks/compare_llama2c.py --llama2c llama2.c --checkpoint out/ckpt.pt --data_dir data/x

llama2.c's model is the same architecture with another layout of the rotary channels; it runs with its own
code here, and only its losses are taken over. docs/real-stories.md has the training commands.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from storylab.data.dataset import load_dataset
from storylab.training.evaluation import evaluate_split
from storylab.training.precision import ComputePolicy


class Adapter(torch.nn.Module):
    """llama2.c's model behind the two methods that evaluation calls."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def token_losses(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = self.model(tokens, targets.contiguous())
        return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama2c", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    args = parser.parse_args()
    sys.path.insert(0, str(args.llama2c))
    from model import ModelArgs, Transformer  # llama2.c's own

    saved = torch.load(args.checkpoint, weights_only=True)
    model = Transformer(ModelArgs(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    block_size = saved["model_args"]["max_seq_len"]
    split = load_dataset(args.data_dir).splits["validation"]
    precision = ComputePolicy(torch.device("cpu"), torch.bfloat16)
    result = evaluate_split(Adapter(model.eval()), split, block_size, precision)  # type: ignore[arg-type]
    print(f"iteration      {saved['iter_num']}")
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"standard error {result.standard_error:.4f} over {len(result.story_losses):,} stories")
    print(f"bits per byte  {result.bits_per_byte:.4f}")


if __name__ == "__main__":
    main()
