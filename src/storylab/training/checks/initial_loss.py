"""The loss of the initial weights is the one that they predict.

Rows of the embedding are drawn from N(0, sigma^2), and the final norm gives every state C features of mean
square 1. The logits of a position are sums of C products with such a row, so they are N(0, s^2) with
s^2 = C * sigma^2. The softmax's normalizer is V times the mean of exp(z), which is exp(s^2 / 2), and the
logit of the target is 0 on average. So the loss is ln V + s^2 / 2.

One logit is not 0 on average: embedding and head are tied, so the token that a position reads has a logit
of its own, which the state tells. The prediction has it in place of a drawn one.

The tolerance follows from the same draws. Targets i and j share a row if they are the same token; then
their logits have a covariance of at most s^2, else of 0. So the mean over the targets has a variance of at
most s^2 * sum f_v^2, where f_v is the share of token v among the targets. The normalizer's logarithm varies
by sqrt((exp(s^2) - 1) / V) at most. Five times the sum of both is allowed, and the effects of the norm's
epsilon and of 16-bit products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from storylab.model.initialization import INIT_STD
from storylab.model.layers import NORM_EPS
from storylab.training.check import Check, Finding, Subject

DEVIATIONS = 5.0
# Nats by which 16-bit products may change a mean loss: 3e-4 was measured at 113M parameters.
ROUNDING = 5e-3


@torch.no_grad()
def run(subject: Subject) -> Finding:
    """Compare the loss of the first windows with the prediction."""
    model, windows = subject.setup.state.model, subject.windows
    tokens, targets = windows[:, :-1], windows[:, 1:]
    seen: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        with subject.uncompiled(), subject.autocast():
            loss = float(model(tokens, targets))
    finally:
        hook.remove()
    (states,) = seen
    own = (states.float() * model.embedding(tokens).float()).sum(dim=-1)
    expected, tolerance = predicted_loss(
        own, tokens == targets, targets, model.embedding.num_embeddings, states.shape[-1]
    )
    fault = ""
    if not abs(loss - expected) <= tolerance:
        fault = (
            f"the loss of the initial weights is {loss:.4f}, and by their draws should be {expected:.4f} "
            f"+/- {tolerance:.4f}: model, head or initial weights are wrong; repair the code that changed, "
            "or run without this check by --skip_checks"
        )
    return Finding(f"loss {loss:.4f}, predicted {expected:.4f} +/- {tolerance:.4f}", fault)


def predicted_loss(
    own: Tensor, repeats: Tensor, targets: Tensor, vocab_size: int, width: int
) -> tuple[float, float]:
    """Mean loss in nats that initial weights predict, and its tolerance.

    Args:
        own: at each position the logit of the token that it reads, float32.
        repeats: where the target is that token, bool of the same shape.
        targets: token ids of the same shape.
        vocab_size: V.
        width: C, features of a state.
    """
    variance = width * INIT_STD**2
    others = math.log(vocab_size - 1) + variance / 2 if vocab_size > 1 else -math.inf
    normalizer = torch.logaddexp(own, torch.full_like(own, others))
    expected = float((normalizer - own.where(repeats, 0.0)).mean())
    shares = targets.flatten().cpu().bincount().double() / targets.numel()
    spread = math.sqrt(variance * float(shares.square().sum()))
    spread += math.sqrt(math.expm1(variance) / vocab_size)
    epsilon = variance / 2 * NORM_EPS / INIT_STD**2
    return expected, DEVIATIONS * spread + epsilon + ROUNDING


CHECK = Check("initial loss", 30, run)
