"""How often are verdicts wrong, how much do they see, and do their intervals cover?

    python benchmarks/verdicts.py
    storylab experiment run benchmarks/equal_recipe.toml --seeds 64 --runs equal-runs
    python benchmarks/verdicts.py --only real --runs equal-runs

Simulated experiments, judged by the functions that judge real ones. The loss of arm a with seed s is
mean(a) + seed(s) + noise(a, s). The seeds' part drops out of the differences, and the arms share the
baseline's noise. Prints the tables of docs/statistics.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np

import intervals_cover
from storylab.experiments import variance as moderation
from storylab.experiments.experiment import Variance
from storylab.experiments.family import Judgement, Rules, Trial, judge
from storylab.experiments.looks import DEFAULT_LOOKS, e_value
from storylab.experiments.outcome import load_outcome
from storylab.experiments.records import experiment_records
from storylab.experiments.statistics import ALPHA

NOISE = 0.005
"""Standard deviation of one run without the seeds' part, in nats: that of paired differences is 0.0071."""
MARGIN = 0.0172
Table = Callable[[int], Iterator[str]]
"""Yields the lines of a table, of as many simulated experiments a cell."""
SEEDS = tuple(range(20))
EFFECTS = (0.005, 0.01, 0.02, 0.04)
# Looks and variance; own variance at five seeds is the rule of `experiment confirm`.
RULES: tuple[tuple[tuple[int, ...], Variance], ...] = (
    *(((n,), "moderated") for n in DEFAULT_LOOKS),
    (DEFAULT_LOOKS, "moderated"),
    *(((n,), "own") for n in DEFAULT_LOOKS),
    (DEFAULT_LOOKS, "own"),
    ((3,), "pooled"),
    (DEFAULT_LOOKS, "pooled"),
)
QUIET = "mixed, noiseless baseline"
KINDS = ("equal", "mixed", "wild", QUIET)


def deviations(rng: np.random.Generator, kind: str, arms: int) -> np.ndarray:
    """Standard deviations of the baseline's and the arms' noise: all equal; those of the arms with
    variances inverse chi-squared with 2 degrees of freedom; one six times the others'; or the second,
    but for a baseline without noise, so that nothing makes the differences more equal."""
    found = np.full(arms + 1, NOISE)
    if kind in ("mixed", QUIET):
        found[1:] = NOISE * np.sqrt(2 / rng.chisquare(2, arms))
    if kind == QUIET:
        found *= math.sqrt(2)
        found[0] = 0.0
    if kind == "wild":
        found[1] = 6 * NOISE
    return found


def differences(rng: np.random.Generator, kind: str, arms: int, seeds: int) -> np.ndarray:
    """Arm minus baseline ``[arms, seeds]`` in nats, with no true difference."""
    noise = rng.standard_normal((arms + 1, seeds)) * deviations(rng, kind, arms)[:, None]
    return noise[1:] - noise[0]


def trials(table: np.ndarray) -> list[Trial]:
    """The rows of differences as arms whose seeds have all ended."""
    ended = frozenset(range(table.shape[1]))
    return [Trial("", dict(enumerate(row)), ended) for row in table.tolist()]


def judged(table: np.ndarray, rules: Rules) -> list[Judgement]:
    """The judgements of arms with these differences."""
    return judge(trials(table), rules)


def finds_any(table: np.ndarray, rules: Rules) -> bool:
    """Whether any arm is called better or worse."""
    return any(j.different for j in judged(table, rules))


def by_e_values(table: np.ndarray) -> bool:
    """Whether, looking after every seed, any arm's e-value ever reaches its bound."""
    bound = len(table) / ALPHA
    return any(e_value(row[:n]) >= bound for row in table.tolist() for n in range(2, len(row) + 1))


def without_plan(table: np.ndarray, variance: Variance = "own") -> bool:
    """Whether, judging after every seed at the whole level, any arm is ever called different."""
    counts = range(2, table.shape[1] + 1)
    return any(finds_any(table[:, :n], Rules(variance=variance)) for n in counts)


def table_of(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table, line by line."""
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join('---' for _ in heads)} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def error_line(shares: Iterable[float], count: int) -> str:
    """Twice the largest Monte Carlo error of the shares."""
    largest = max(math.sqrt(s * (1 - s) / count) for s in shares)
    error = f"Monte Carlo error (2 sd) at most {200 * largest:.1f} %"
    return f"{count:,} simulated experiments a cell; {error}."


def looks_text(looks: Sequence[int]) -> str:
    return ", ".join(map(str, looks))


def errors(count: int, arms: int = 6) -> Iterator[str]:
    """Chance of at least one wrong better or worse, in per cent."""
    tests: list[tuple[str, str, int, Callable[[np.ndarray], bool]]] = []
    for looks, variance in RULES:
        rules = Rules(looks, SEEDS, variance)
        name = f"{variance} (confirm)" if (looks, variance) == ((5,), "own") else variance
        tests.append((looks_text(looks), name, looks[-1], partial(finds_any, rules=rules)))
    tests += [
        ("after every seed to 8", "e-value", 8, by_e_values),
        ("after every seed to 20", "e-value", 20, by_e_values),
        ("no plan: after every seed to 8", "own", 8, without_plan),
    ]
    rows, shares = [], []
    for looks_name, name, seeds, test in tests:
        rng = np.random.default_rng(16)
        found = [
            float(np.mean([test(differences(rng, kind, arms, seeds)) for _ in range(count)]))
            for kind in KINDS
        ]
        shares += found
        rows.append((looks_name, name, *map(percent, found)))
    yield from table_of(("looks, seeds", "variance", *KINDS), rows)
    yield ""
    yield f"{arms} arms. {error_line(shares, count)}"


def promises(count: int, arms: int = 6) -> Iterator[str]:
    """The errors of the default rule and of confirming again, with four times the draws."""
    count *= 4
    rows, shares = [], []
    for rules in (Rules(DEFAULT_LOOKS, SEEDS), Rules((5,), SEEDS, "own")):
        rng = np.random.default_rng(23)
        seeds = rules.looks[-1]
        found = [
            float(
                np.mean(
                    [finds_any(differences(rng, kind, arms, seeds), rules) for _ in range(count)]
                )
            )
            for kind in KINDS
        ]
        shares += found
        rows.append((looks_text(rules.looks), rules.variance, *map(percent, found)))
    yield from table_of(("looks, seeds", "variance", *KINDS), rows)
    yield ""
    yield f"{arms} arms. {error_line(shares, count)}"


def caps(count: int, arms: int = 6) -> Iterator[str]:
    """The errors of moderated variance at one look, by the most degrees of freedom that an arm borrows."""
    rows, shares = [], []
    for most in (2.0, moderation.MOST_BORROWED, 8.0, 1e6):
        rng = np.random.default_rng(19)
        with patch.object(moderation, "MOST_BORROWED", most):
            found = [
                float(
                    np.mean(
                        [
                            finds_any(differences(rng, kind, arms, 3), Rules((3,), SEEDS))
                            for _ in range(count)
                        ]
                    )
                )
                for kind in KINDS
            ]
        shares += found
        rows.append((f"{most:g}" if most < 1e6 else "no cap", *map(percent, found)))
    yield from table_of(("degrees of freedom borrowed, at most", *KINDS), rows)
    yield ""
    yield f"{arms} arms, 3 seeds. {error_line(shares, count)}"


def powers(count: int) -> Iterator[str]:
    """Chance to find one arm that truly differs, in per cent; four effects are tried in every draw."""
    count = max(1, count // 3)
    rows, shares = [], []
    for looks, variance in RULES:
        for arms in (2, 6, 10) if variance != "pooled" else (6,):
            rng = np.random.default_rng(17)
            hits = np.zeros(len(EFFECTS))
            seeds = np.zeros(len(EFFECTS))
            for _ in range(count):
                table = differences(rng, "equal", arms, looks[-1])
                for i, effect in enumerate(EFFECTS):
                    moved = table.copy()
                    moved[-1] += effect
                    j = judged(moved, Rules(looks, SEEDS, variance))[-1]
                    hits[i] += j.different
                    seeds[i] += j.look or 0
            shares += list(hits / count)
            cells = [f"{100 * hit / count:.0f}" for hit in hits]
            if len(looks) > 1:
                used = zip(cells, seeds / count, strict=True)
                cells = [f"{cell} ({mean:.1f} seeds)" for cell, mean in used]
            rows.append((looks_text(looks), variance, str(arms), *cells))
    yield from table_of(("looks, seeds", "variance", "arms", *map(str, EFFECTS)), rows)
    yield ""
    yield f"Arms of equal noise. {error_line(shares, count)}"


def equivalences(count: int, arms: int = 6) -> Iterator[str]:
    """Chance of a false equivalent where all arms differ by the margin, and of a true one, in per cent."""
    count = max(1, count // 2)
    rows, shares = [], []
    for looks, variance in RULES:
        rules = Rules(looks, SEEDS, variance, MARGIN)
        cells = []
        for kind in KINDS:
            rng = np.random.default_rng(18)
            tables = (differences(rng, kind, arms, looks[-1]) + MARGIN for _ in range(count))
            cells.append(
                float(np.mean([any(j.equivalent for j in judged(t, rules)) for t in tables]))
            )
        rng = np.random.default_rng(19)
        tables = (differences(rng, "equal", arms, looks[-1]) for _ in range(count))
        cells.append(float(np.mean([judged(t, rules)[-1].equivalent for t in tables])))
        shares += cells
        rows.append((looks_text(looks), variance, *map(percent, cells)))
    heads = (
        "looks, seeds",
        "variance",
        *(f"false, {kind}" for kind in KINDS),
        "an equal arm, equal noise",
    )
    yield from table_of(heads, rows)
    yield ""
    yield f"{arms} arms, margin {MARGIN}. {error_line(shares, count)}"


def real(runs: Path, count: int) -> Iterator[str]:
    """Chance of at least one wrong better or worse among real runs of one recipe, in per cent."""
    count = max(1, count // 2)
    (record,) = experiment_records(runs)
    (cell,) = load_outcome(record).cells
    losses = np.array(cell.arm.losses)
    deviation = losses.std(ddof=1)
    yield f"{len(losses)} seeds of one recipe: loss {losses.mean():.4f}, deviation {deviation:.4f}."
    yield ""
    tests: list[tuple[str, Callable[[np.ndarray], bool]]] = [
        ("no plan: after every seed, own variance", without_plan),
        ("no plan: after every seed, moderated", partial(without_plan, variance="moderated")),
        ("no plan: at 3, 5 and 8 seeds, own variance", _at_each_look),
        ("planned looks 3, 5, 8, moderated", _planned("moderated")),
        ("planned looks 3, 5, 8, own", _planned("own")),
        ("one look at 5, own (confirm)", partial(finds_any, rules=Rules((5,), SEEDS, "own"))),
        ("e-value after every seed", by_e_values),
    ]
    arms_tried = (1, 2, 6)
    rows = []
    for name, test in tests:
        cells = []
        for arms in arms_tried:
            rng = np.random.default_rng(20)
            wrong = [test(_dealt(rng, losses, arms)) for _ in range(count)]
            cells.append(percent(float(np.mean(wrong))))
        rows.append((name, *cells))
    yield from table_of(("rule", *(f"{a} arm{'s' * (a > 1)}" for a in arms_tried)), rows)
    yield ""
    yield f"{count:,} random deals of the runs into arms of 8 seeds; the deals share their runs."


def _dealt(rng: np.random.Generator, losses: np.ndarray, arms: int) -> np.ndarray:
    """Differences of arms to a baseline, all of the same recipe: runs at random, 8 to each."""
    table = rng.permutation(losses)[: 8 * (arms + 1)].reshape(arms + 1, 8)
    return np.asarray(table[1:] - table[0])


def _planned(variance: Variance) -> Callable[[np.ndarray], bool]:
    return lambda table: finds_any(table, Rules(DEFAULT_LOOKS, SEEDS, variance))


def _at_each_look(table: np.ndarray) -> bool:
    return any(finds_any(table[:, :n], Rules(variance="own")) for n in DEFAULT_LOOKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    tables: dict[str, Table] = {
        "errors": errors,
        "promises": promises,
        "caps": caps,
        "powers": powers,
        "equivalences": equivalences,
        "coverage": intervals_cover.tables,
    }
    parser.add_argument("--only", nargs="+", default=list(tables), choices=[*tables, "real"])
    parser.add_argument("--runs", type=Path, help="runs of one recipe, for `--only real`")
    parser.add_argument(
        "--count", type=int, default=1500, help="simulated experiments a cell of the first table"
    )
    arguments = parser.parse_args()
    for name in arguments.only:
        if name == "real":
            if arguments.runs is None:
                parser.error("real: give the folder of the runs as --runs")
            lines = real(arguments.runs, arguments.count)
        else:
            lines = tables[name](arguments.count)
        print(f"\n{name}\n")
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
