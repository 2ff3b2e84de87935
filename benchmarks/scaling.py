"""How the best learning rates and the gain of the fast method change with size, and what follows for 113M.

    storylab experiment run experiments/time-to-loss/scaling.toml --scale 3m        (and 1m, 6m, 10m, 25m)
    storylab experiment run experiments/time-to-loss/scaling-gain.toml --scale 3m   (and 1m, 6m, 10m, 25m)
    python benchmarks/scaling.py runs

A best rate is the lowest point of the parabola through the losses of three rates by their logarithm. Rates
and gains are fitted to a line in the logarithm of the number of parameters; the interval is the 95 %
prediction interval of least squares for one more size.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from storylab.experiments.outcome import Outcome, load_outcome
from storylab.experiments.statistics import Interval, mean_interval

SCALES = ("1m", "3m", "6m", "10m", "25m")
LARGE = 113e6


@dataclass(frozen=True)
class Line:
    """``y = intercept + slope * log(parameters)`` of least squares."""

    sizes: tuple[float, ...]
    slope: float
    intercept: float
    deviation: float
    """Root of the residual sum of squares over its degrees of freedom, those of the sizes minus 2."""

    def at(self, parameters: float) -> tuple[float, float, float]:
        """The value at another size with the ends of its 95 % prediction interval."""
        x, new = np.log(self.sizes), math.log(parameters)
        n, value = len(x), self.intercept + self.slope * new
        spread = 1 + 1 / n + (new - x.mean()) ** 2 / float(((x - x.mean()) ** 2).sum())
        reach = float(stats.t.ppf(0.975, n - 2)) * self.deviation * math.sqrt(spread)
        return value, value - reach, value + reach


def fit(values: Mapping[float, float]) -> Line | None:
    """The line through values by number of parameters; None for fewer than three."""
    if len(values) < 3:
        return None
    x, y = np.log(list(values)), np.array(list(values.values()))
    slope, intercept = np.polyfit(x, y, 1)
    rest = y - intercept - slope * x
    deviation = math.sqrt(float((rest**2).sum()) / (len(x) - 2))
    return Line(tuple(values), float(slope), float(intercept), deviation)


def lowest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at the lowest point of the parabola through three losses by the logarithm of the rate.

    Returns:
        None if it is more than half a step of the rates outside of them, or the losses bend down.
    """
    x = np.log(rates)
    bend, tilt, _ = np.polyfit(x, losses, 2)
    if bend <= 0:
        return None
    best, margin = -tilt / (2 * bend), (x[-1] - x[0]) / 4
    return math.exp(best) if x[0] - margin <= best <= x[-1] + margin else None


def parameters_of(outcome: Outcome) -> float:
    """Number of parameters of the baseline."""
    return float(outcome.cells[0].arm.finished[0].results.parameters)


def rate_tables(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The losses of all rates by size, and each method's best rate."""
    for kind in ("AdamW", "fast"):
        yield f"{kind}, nats at a learning rate of"
        best: dict[float, float] = {}
        for outcome in outcomes:
            arms = [cell.arm for cell in outcome.cells if cell.arm.name.startswith(kind)]
            if not all(arm.finished for arm in arms):
                continue
            rates = [arm.finished[0].config.learning_rate for arm in arms]
            losses = [arm.finished[0].loss for arm in arms]
            found = lowest(rates, losses)
            size = parameters_of(outcome)
            cells = ", ".join(f"{r:g}: {loss:.4f}" for r, loss in zip(rates, losses, strict=True))
            yield f"  {size / 1e6:5.2f}M  {cells}  best {f'{found:.2g}' if found else 'outside'}"
            if found:
                best[size] = math.log(found)
        if line := fit(best):
            value, low, high = map(math.exp, line.at(LARGE))
            yield (
                f"  best rate ~ parameters^{line.slope:.2f}; at 113M {value:.2g} "
                f"({low:.2g} to {high:.2g})"
            )


def gain_table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The gain of the fast method by size."""
    yield "AdamW minus fast, nats, 95 % interval over seeds"
    gains: dict[float, float] = {}
    for outcome in outcomes:
        losses = {
            cell.arm.name: {run.config.seed: run.loss for run in cell.arm.finished}
            for cell in outcome.cells
        }
        shared = sorted(losses["AdamW"].keys() & losses["fast"].keys())
        found = mean_interval([losses["AdamW"][s] - losses["fast"][s] for s in shared])
        if found is None:
            continue
        size = parameters_of(outcome)
        gains[size] = found.estimate
        yield f"  {size / 1e6:5.2f}M  {_means(losses)}  {_text(found)}, {found.n} seeds"
    if line := fit(gains):
        value, low, high = line.at(LARGE)
        yield f"  at 113M {value:.2f} ({low:.2f} to {high:.2f})"


def _means(losses: Mapping[str, Mapping[int, float]]) -> str:
    return ", ".join(f"{name} {np.mean(list(of.values())):.4f}" for name, of in losses.items())


def _text(interval: Interval) -> str:
    return f"{interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of the runs")
    folders: list[Path] = parser.parse_args().runs
    tables = {"scaling": rate_tables, "scaling-gain": gain_table}
    for stem, lines in tables.items():
        records = [
            folder / "experiments" / f"{stem}-{scale}.json"
            for scale in SCALES
            for folder in folders
        ]
        outcomes = [load_outcome(path) for path in records if path.exists()]
        for line in lines(outcomes):
            print(line)


if __name__ == "__main__":
    main()
