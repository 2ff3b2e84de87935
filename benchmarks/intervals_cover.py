"""Coverage of every interval that a comparison prints, by simulation; part of verdicts.py.

Curves and speeds of simulated runs go through the functions that read those of real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from scipy import stats

import verdicts
from storylab.config import ModelConfig
from storylab.experiments.comparison import Comparison
from storylab.experiments.curve_comparison import equal_time, ratio_of, reach
from storylab.experiments.family import Judgement, Rules
from storylab.experiments.statistics import (
    Interval,
    mean_interval,
    share_interval,
    single_interval,
    story_interval,
    unpaired_interval,
)
from storylab.record.run import Run

# True differences of six arms, in nats.
TRUTH = np.array([0.0, 0.01, -0.01, 0.02, 0.0, 0.04])
STORIES = 400
TOKENS = np.geomspace(2e4, 1e6, 12)


def comparison(judgement: Judgement, stories: Interval | None = None) -> Comparison:
    """A comparison without runs: its words and intervals depend on the judgement alone."""
    nothing: dict[str, Any] = dict.fromkeys(Comparison.__dataclass_fields__)
    lists: dict[str, Any] = dict.fromkeys(
        ("confounds", "speed_confounds", "notes", "failures", "exploratory"), ()
    )
    counts = {"diverged": (0, 0), "ended": (8, 8), "pairs": 8, "paired": True}
    given = {"judgement": judgement, "stories": stories}
    return Comparison(**(nothing | lists | counts | given))


def tables(count: int) -> Iterator[str]:
    """Both tables: the intervals of the verdicts, and all others."""
    yield from verdict_intervals(count)
    yield ""
    yield from other_intervals(count)


def verdict_intervals(count: int) -> Iterator[str]:
    """How often all printed intervals of an experiment hold the true differences, in per cent."""
    count = max(1, count // 2)
    rows, shares = [], []
    for looks, variance in verdicts.RULES:
        rules = Rules(looks, verdicts.SEEDS, variance, verdicts.MARGIN)
        cells = []
        for kind in verdicts.KINDS:
            rng = np.random.default_rng(21)
            covered = 0
            for _ in range(count):
                table = verdicts.differences(rng, kind, len(TRUTH), looks[-1]) + TRUTH[:, None]
                ends = [comparison(j).ends for j in verdicts.judged(table, rules)]
                covered += all(
                    e is None or e[0] <= true <= e[1] for e, true in zip(ends, TRUTH, strict=True)
                )
            cells.append(covered / count)
        shares += cells
        rows.append((verdicts.looks_text(looks), variance, *map(verdicts.percent, cells)))
    yield from verdicts.table_of(("looks, seeds", "variance", *verdicts.KINDS), rows)
    yield ""
    yield f"Six arms with unequal true differences. {verdicts.error_line(shares, count)}"


def other_intervals(count: int) -> Iterator[str]:
    """Coverage of the other 95 % intervals, in per cent."""
    count = max(1, count // 2)
    sizes = (3, 5, 8)
    draws: list[tuple[str, Callable[[np.random.Generator, int, int], float]]] = [
        ("over new seeds and new stories", _over_both),
        ("these models on stories like these", _stories),
        ("unpaired (Welch), baseline's noise 2x", _unpaired),
        ("one run against n seeds, equally noisy", lambda g, n, c: _one_run(g, n, c, 1.0)),
        ("one run against n seeds, 2x as noisy", lambda g, n, c: _one_run(g, n, c, 2.0)),
        ("ratio of speeds, memory, energy", _ratio),
        ("at equal time", lambda g, n, c: _curves(g, n, c)[0]),
        ("tokens for an equal loss", lambda g, n, c: _curves(g, n, c)[1]),
        ("share that diverged, at its worst", lambda _, n, __: _shares(n)),
    ]
    rows = []
    for name, draw in draws:
        found = [draw(np.random.default_rng(22), n, count) for n in sizes]
        rows.append((name, *map(verdicts.percent, found)))
    yield from verdicts.table_of(("interval", *(f"{n} seeds" for n in sizes)), rows)
    yield ""
    error = 200 * math.sqrt(0.05 * 0.95 / count)
    yield f"{count:,} simulated pairs of arms a cell; Monte Carlo error (2 sd) {error:.1f} % at 95 %."


def _holds(interval: Interval | None, true: float) -> bool:
    return interval is not None and interval.low <= true <= interval.high


def _story_losses(
    rng: np.random.Generator, seeds: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Differences in nats a token of every seed and story ``[seeds, stories]``, the effects of the
    seeds, and the stories' tokens. The true difference over all seeds and stories is zero."""
    tokens = np.ceil(rng.lognormal(5.0, 0.4, STORIES))
    seed = rng.standard_normal(seeds) * 0.007
    story = rng.standard_normal(STORIES) * 0.08
    rest = rng.standard_normal((seeds, STORIES)) * 0.05
    return seed[:, None] + story + rest, seed, tokens


def _story_interval(values: np.ndarray, tokens: np.ndarray) -> Interval | None:
    return story_interval(values.mean(0) * tokens, np.zeros(len(tokens)), tokens)


def _over_both(rng: np.random.Generator, n: int, count: int) -> float:
    covered = 0
    for _ in range(count):
        values, _, tokens = _story_losses(rng, n)
        interval = mean_interval(list(values @ tokens / tokens.sum()))
        both = comparison(Judgement(interval), _story_interval(values, tokens)).over_both
        covered += _holds(both, 0.0)
    return covered / count


def _stories(rng: np.random.Generator, n: int, count: int) -> float:
    """The models are fixed: the truth is the difference of these seeds on all stories."""
    covered = 0
    for _ in range(count):
        values, seed, tokens = _story_losses(rng, n)
        covered += _holds(_story_interval(values, tokens), float(seed.mean()))
    return covered / count


def _unpaired(rng: np.random.Generator, n: int, count: int) -> float:
    draws = (rng.standard_normal((2, n)) * [[0.01], [0.02]] for _ in range(count))
    return float(np.mean([_holds(unpaired_interval(list(a), list(b)), 0.0) for a, b in draws]))


def _one_run(rng: np.random.Generator, n: int, count: int, noisier: float) -> float:
    covered = 0
    for _ in range(count):
        baseline, run = rng.standard_normal(n), float(noisier * rng.standard_normal())
        deviation = float(baseline.std(ddof=1))
        covered += _holds(
            single_interval(
                run - float(baseline.mean()), [(deviation, n)] * 2, (1, n), shared=True
            ),
            0.0,
        )
    return covered / count


def _ratio(rng: np.random.Generator, n: int, count: int) -> float:
    true, covered = 1.2, 0
    for _ in range(count):
        machine = rng.standard_normal(n) * 0.1
        noise = rng.standard_normal((2, n)) * 0.03
        ours, theirs = np.exp(machine + noise[0]) * true, np.exp(machine + noise[1])
        r = ratio_of(list(zip(ours.tolist(), theirs.tolist(), strict=True)))
        covered += bool(r and r.low and r.high and r.low <= true <= r.high)
    return covered / count


def _run(tokens: np.ndarray, losses: np.ndarray, rate: float) -> Run:
    """A stand-in with the curve of a run, for the functions that read curves alone."""
    points = zip(tokens.tolist(), (tokens / rate).tolist(), losses.tolist(), strict=True)
    evaluations = [SimpleNamespace(tokens=t, seconds=s, val_loss=v) for t, s, v in points]
    data = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=1024))
    config = SimpleNamespace(model=ModelConfig(), block_size=128)
    return cast(Run, SimpleNamespace(evaluations=evaluations, data=data, config=config))


def _pair(rng: np.random.Generator) -> tuple[Run, Run]:
    """Two runs with one seed: the arm needs 1 / 1.3 of the tokens and 1.1 of the time a token."""
    seed = rng.standard_normal() * 0.01
    noise = rng.standard_normal((2, 1)) * 0.01 + rng.standard_normal((2, len(TOKENS))) * 0.003

    def losses(faster: float) -> np.ndarray:
        return np.asarray(1.5 + 12.0 * (TOKENS * faster) ** -0.2)

    ours, theirs = losses(1.3) + seed + noise[0], losses(1.0) + seed + noise[1]
    return _run(TOKENS, ours, 1 / 1.1), _run(TOKENS, theirs, 1.0)


def _curves(rng: np.random.Generator, n: int, count: int) -> tuple[float, float]:
    """Shares of intervals that hold the mean of many pairs: at equal time, and of tokens."""
    many = [_pair(rng) for _ in range(2000)]
    time, tokens = equal_time("a", "b", many), reach(many, True)
    assert time is not None and tokens is not None
    covered = np.zeros(2)
    for _ in range(count):
        pairs = [_pair(rng) for _ in range(n)]
        e, r = equal_time("a", "b", pairs), reach(pairs, True)
        if e and e.interval:
            covered[0] += e.interval.low <= time.difference <= e.interval.high
        if r and r.tokens.low and r.tokens.high:
            covered[1] += r.tokens.low <= tokens.tokens.value <= r.tokens.high
    return float(covered[0] / count), float(covered[1] / count)


def _shares(n: int) -> float:
    """The least coverage over all true shares."""
    ends = [share_interval(count, n) for count in range(n + 1)]
    least = 1.0
    for true in np.linspace(0.001, 0.999, 999):
        holds = np.array([low <= true <= high for low, high in ends])
        least = min(least, float(holds @ stats.binom.pmf(np.arange(n + 1), n, true)))
    return math.floor(least * 1000) / 1000
