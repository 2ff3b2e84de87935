"""The outcome of an experiment: its arms with their runs, the comparisons, the hypothesis checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from storylab.config import TrainConfig, from_dict
from storylab.errors import UserError
from storylab.experiments.blocks import block_of, effects_of
from storylab.experiments.compare import compare_contests
from storylab.experiments.comparison import Arm, Comparison
from storylab.experiments.contest import Contest
from storylab.experiments.effects import EffectResult, verdicts_of
from storylab.experiments.experiment import Expectation, counted_up
from storylab.experiments.factorial import Factorial, fields_between
from storylab.experiments.factors import allowed_fields, qualified_name
from storylab.experiments.family import Judgement, Rules
from storylab.experiments.measures import MEASURES, Checked
from storylab.experiments.records import FolderCache
from storylab.experiments.registration import exploratory_reasons, reasons_of_runs
from storylab.record.experiment_schema import CellRecord, ExperimentRecord
from storylab.record.index import RunCache
from storylab.record.run import FAILED, NEW, UNFINISHED, Run


@dataclass(frozen=True)
class CellResult:
    """An arm under a condition: its planned config, and its runs."""

    condition: str
    arm: Arm
    config: TrainConfig
    planned: int
    """Number of runs that the experiment lists for it."""

    @property
    def name(self) -> str:
        """Arm and condition."""
        return qualified_name(self.arm.name, self.condition)


@dataclass(frozen=True)
class Outcome:
    """An experiment's record and everything computed from its runs."""

    label: str
    record: ExperimentRecord
    cells: tuple[CellResult, ...]
    comparisons: tuple[Comparison, ...]
    expectations: tuple[Checked, ...]
    problems: tuple[str, ...]
    effects: tuple[EffectResult, ...] = ()
    """The verdicts of a factorial experiment, whose comparisons of cells only describe them."""

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions in the file's order; a single one named "" if the file has none."""
        return tuple(dict.fromkeys(cell.condition for cell in self.cells))

    @property
    def baseline(self) -> str:
        """Name of the baseline arm."""
        return self.record.baseline

    @property
    def factor(self) -> str:
        """Name of the factor that the arms differ in."""
        return self.record.factor

    def arms(self, condition: str) -> list[CellResult]:
        """The arms under a condition, in the file's order."""
        return [cell for cell in self.cells if cell.condition == condition]

    def baseline_of(self, condition: str) -> CellResult:
        """The baseline under a condition."""
        return next(c for c in self.arms(condition) if c.arm.name == self.baseline)

    def settled_arms(self) -> set[tuple[str, str]]:
        """Condition and name of the arms to whose verdicts more seeds would add nothing. Every effect of a
        factorial experiment needs all cells, so they settle together."""
        if not self.effects:
            return {(c.condition, c.arm) for c in self.comparisons if c.settled}
        open_still = {e.condition for e in self.effects if not e.settled}
        return {(c.condition, c.arm) for c in self.comparisons if c.condition not in open_still}

    @property
    def verdicts(self) -> list[str]:
        """See :func:`storylab.experiments.effects.verdicts_of`."""
        return verdicts_of(self.comparisons, self.effects)

    @property
    def judgements(self) -> list[Judgement]:
        """The judgements that are verdicts: of the effects, or of every arm."""
        return [result.judgement for result in self.effects or self.comparisons]

    @property
    def factorial(self) -> Factorial | None:
        """The design of a factorial experiment."""
        return Factorial.of(self.record.factorial) if self.record.factorial else None

    @property
    def runs(self) -> list[Run]:
        """Every readable run, once."""
        found = {run.folder: run for cell in self.cells for run in cell.arm.runs}
        return list(found.values())


def load_outcome(path: Path, cache: FolderCache | None = None) -> Outcome:
    """Read an experiment's record and its runs, and compare its arms.

    A run that is missing or damaged is named in ``problems`` and left out.

    Args:
        path: the experiment's record.
        cache: runs and records that have been read already.

    Raises:
        UserError: the record itself is missing or damaged.
    """
    cache = cache or FolderCache()
    record = cache.record(path)
    try:
        cells, problems = _read_cells(record, path.parent.parent, cache)
        allowed_fields(record.factor, matched=False)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    outcome = Outcome(path.stem, record, cells, (), (), problems)
    contests, rules, design = _contests(outcome, cache), rules_of(record), outcome.factorial
    comparisons = compare_contests(contests, rules, judged=design is None)
    reasons = (
        *exploratory_reasons(record),
        *reasons_of_runs(record, (pair for c in contests for pair in c.pairs)),
    )
    outcome = dataclasses.replace(
        outcome,
        comparisons=tuple(dataclasses.replace(c, exploratory=reasons) for c in comparisons),
        effects=tuple(_effects(outcome, design, contests, rules, reasons)) if design else (),
    )
    expectations = [Expectation(**structs.asdict(entry)) for entry in record.expectations]
    checked = tuple(check for e in expectations for check in _check(e, outcome))
    return dataclasses.replace(outcome, expectations=checked)


def rules_of(record: ExperimentRecord) -> Rules:
    """How a record's experiment is judged: by its plan, or, without one, at whatever it has."""
    seeds = record.seeds
    if record.looks and seeds:
        seeds = counted_up(seeds, max(len(seeds), record.looks[-1]))
    return Rules(tuple(record.looks), tuple(seeds), record.variance, record.margin)


def _effects(
    outcome: Outcome,
    design: Factorial,
    contests: Sequence[Contest],
    rules: Rules,
    reasons: tuple[str, ...],
) -> list[EffectResult]:
    """The effects of a factorial experiment under every condition."""
    blocks = []
    for condition in outcome.conditions:
        arms = {cell.arm.name: cell.arm for cell in outcome.arms(condition)}
        blocks.append(
            block_of(
                condition,
                [arms[name] for name in outcome.record.arms],
                [contest for contest in contests if contest.condition == condition],
            )
        )
    return effects_of(design, blocks, rules, reasons)


def _contests(outcome: Outcome, cache: RunCache) -> list[Contest]:
    """Every arm against the baseline of its condition."""
    return [
        Contest(
            cell.arm,
            outcome.baseline_of(condition).arm,
            fields_between(
                outcome.factorial,
                outcome.factor,
                outcome.record.arms,
                (cell.arm.name, outcome.baseline),
                condition in outcome.record.matched,
            ),
            condition,
            cache=cache,
        )
        for condition in outcome.conditions
        for cell in outcome.arms(condition)
        if cell.arm.name != outcome.baseline
    ]


def _read_cells(
    record: ExperimentRecord, runs: Path, cache: RunCache
) -> tuple[tuple[CellResult, ...], tuple[str, ...]]:
    """The cells with their runs, and the runs that cannot be read or are missing."""
    problems: list[str] = []
    missing: list[str] = []
    cells = tuple(_read_cell(cell, runs, cache, problems, missing) for cell in record.cells)
    if record.stage == "confirm":
        cells = _on_test(record, cells, problems)
    if missing:
        problems.append(
            f"{len(missing)} runs are missing, not trained yet or deleted: {', '.join(missing)}"
        )
    return cells, tuple(problems)


def _read_cell(
    cell: CellRecord, runs: Path, cache: RunCache, problems: list[str], missing: list[str]
) -> CellResult:
    """Read a cell with its runs; those that cannot be read are named in ``problems`` or ``missing``."""
    found = []
    for seed, name in cell.runs.items():
        where = qualified_name(cell.arm, cell.condition)
        try:
            found.append(cache.load(runs / name))
        except UserError as error:
            state, reason = cache.state(runs / name)
            if state == NEW:
                missing.append(f"{where}, seed {seed} ({name})")
                continue
            # A run that failed before it had a config still has its reason.
            why = reason if state == FAILED else str(error).replace(f"{runs}/", "")
            problems.append(f"{where}, seed {seed}: {why}")
    arm, config = Arm(cell.arm, tuple(found)), from_dict(cell.config)
    return CellResult(cell.condition, arm, config, len(cell.runs))


def _on_test(
    record: ExperimentRecord, cells: tuple[CellResult, ...], problems: list[str]
) -> tuple[CellResult, ...]:
    """The cells with final losses on the test split; no runs before all planned ones have ended, as a
    look at some of them is a look."""
    ended = {
        (cell.condition, cell.arm.name, run.config.seed)
        for cell in cells
        for run in cell.arm.runs
        if run.state != UNFINISHED
    }
    planned = {(c.condition, c.arm.name, seed) for c in cells for seed in record.seeds}
    if not planned <= ended:
        problems.append(
            f"the test split stays closed: {len(planned & ended)} of {len(planned)} runs have ended"
        )
        return tuple(dataclasses.replace(c, arm=Arm(c.arm.name, ())) for c in cells)
    return tuple(_cell_on_test(cell, problems) for cell in cells)


def _cell_on_test(cell: CellResult, problems: list[str]) -> CellResult:
    """A cell whose final losses are those on the test split; runs without them are named in
    ``problems`` and left out."""
    found = []
    for run in cell.arm.runs:
        if not run.finished:
            found.append(run)
        elif run.results.test is not None:
            summary = structs.replace(run.results, validation=run.results.test)
            found.append(dataclasses.replace(run, summary=summary, story_losses=run.test_losses))
        else:
            problems.append(f"{cell.name}, seed {run.config.seed}: no losses on a test split")
    return dataclasses.replace(cell, arm=Arm(cell.arm.name, tuple(found)))


def _check(expectation: Expectation, outcome: Outcome) -> Iterable[Checked]:
    """Compare the expectation with its arm, under every condition that it covers."""
    for cell in outcome.cells:
        wanted = expectation.condition in (None, cell.condition)
        if cell.arm.name == expectation.arm and wanted:
            yield Checked(expectation, cell.condition, *MEASURES[expectation.metric](cell, outcome))
