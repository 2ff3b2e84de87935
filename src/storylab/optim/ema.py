"""An exponential moving average (EMA) of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of a model's weights over about the last ``span`` iterations, or over all
    iterations of a shorter run. Training does not see it.

    Args:
        model: its weights as they begin are the first average.
        span: iterations that the average remembers; 0 for no average, which does nothing.
    """

    def __init__(self, model: nn.Module, span: float) -> None:
        self.span = span
        self.tensors: dict[str, Tensor] = {}
        """Average of each weight by its name, float32; empty for no average."""
        if span:
            self.tensors = {n: p.detach().clone() for n, p in model.named_parameters()}

    def update(self, model: nn.Module, iteration: int) -> None:
        """Add the weights after ``iteration`` (from 0) to the average."""
        if self.tensors:
            newest = 1 / min(iteration + 1, max(1.0, self.span))
            weights = [_local(p.detach()) for p in model.parameters()]
            torch._foreach_lerp_([_local(t) for t in self.tensors.values()], weights, newest)

    @torch.no_grad()
    def exchange(self, model: nn.Module) -> bool:
        """Swap the model's weights and their average in place; a second call restores them. Returns
        whether there is an average."""
        for name, parameter in model.named_parameters():
            if name in self.tensors:
                weight = parameter.clone()
                parameter.copy_(self.tensors[name])
                self.tensors[name].copy_(weight)
        return bool(self.tensors)


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless it is a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
