"""Draw a run's losses against iterations as SVG: python benchmarks/plot_run.py RUN OUT.svg"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt

import storylab


def main() -> None:
    run = storylab.load_run(sys.argv[1])
    training, evaluations = run.iterations, run.evaluations
    plt.rcParams["svg.hashsalt"] = "storylab"  # the same run gives the same bytes
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    iterations = [row.iteration for row in training]
    axes.plot(iterations, [row.loss for row in training], lw=0.8, label="batch")
    at = [row.iteration for row in evaluations]
    axes.plot(at, [row.train_loss for row in evaluations], "s--", ms=4, label="train windows")
    axes.plot(at, [row.val_loss for row in evaluations], "o-", ms=4, label="validation windows")
    axes.set(xlabel="iteration", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    metadata = {"Date": None} if sys.argv[2].endswith(".svg") else None
    figure.savefig(sys.argv[2], metadata=metadata)


if __name__ == "__main__":
    main()
