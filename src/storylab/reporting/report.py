"""Write the report: a pure function of the folder of runs (and of the remarks in an older log)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import vl_convert

from storylab.errors import UserError
from storylab.experiments.factors import qualified_name
from storylab.experiments.outcome import Outcome, load_outcome
from storylab.experiments.records import FolderCache, experiment_records
from storylab.files import exists, make_folder, read_text, write_text
from storylab.reporting.choices import choices
from storylab.reporting.figures import cost, curves, effects, precision
from storylab.reporting.figures.style import Spec, condition_of, static
from storylab.reporting.html import html
from storylab.reporting.markdown import Section, markdown
from storylab.reporting.remarks import read_remarks

LOG_FILE, PAGE_FILE, PICTURES = "EXPERIMENTS.md", "index.html", "pictures"


def write_report(
    runs: Path,
    out: Path,
    cache: FolderCache | None = None,
    known: Mapping[Path, Outcome] | None = None,
) -> Path:
    """Write EXPERIMENTS.md, index.html and the pictures of every experiment in ``runs`` to ``out``.

    Args:
        runs: the folder of runs.
        out: the folder to write.
        cache: runs and records that have been read already.
        known: outcomes that have been computed already, by the path of the experiment's record.

    Raises:
        UserError: there are no experiments, or the folder cannot be written.
    """
    records = experiment_records(runs)
    if not records:
        raise UserError(
            f"{runs} has no experiments yet: run one with `storylab experiment run FILE --runs {runs}`"
        )
    cache = cache or FolderCache()
    outcomes, problems = _read_outcomes(records, cache, known or {})
    chosen = choices(outcomes, runs, cache)
    specs = {outcome.label: dict(_figures(outcome)) for outcome in outcomes}
    log = out / LOG_FILE
    make_folder(out / PICTURES)
    remarks = _read_remarks(log)
    sections = [
        Section(outcome, _write_pictures(outcome, specs[outcome.label], out), chosen[outcome.label])
        for outcome in outcomes
    ]
    write_text(log, markdown(sections, problems, remarks, PAGE_FILE))
    write_text(out / PAGE_FILE, html(outcomes, specs, problems, chosen))
    return out


def experiment_page(path: Path, cache: FolderCache, bundle: str) -> str:
    """The page of one experiment, as HTML.

    Args:
        path: the experiment's record.
        cache: runs and records that have been read already.
        bundle: address of the script that draws the figures; the page does not hold it.

    Raises:
        UserError: the record is missing or damaged, or a file cannot be read.
    """
    outcome = load_outcome(path, cache)
    specs = {outcome.label: dict(_figures(outcome))}
    return html([outcome], specs, (), choices([outcome], path.parent.parent, cache), bundle)


def _read_outcomes(
    records: Sequence[Path], cache: FolderCache, known: Mapping[Path, Outcome]
) -> tuple[list[Outcome], list[str]]:
    """The outcomes of the records, and the faults of those that cannot be read."""
    outcomes, problems = [], []
    for path in records:
        try:
            outcomes.append(known.get(path) or load_outcome(path, cache))
        except UserError as error:
            problems.append(str(error))
    return outcomes, problems


def _write_pictures(outcome: Outcome, specs: dict[str, Spec], out: Path) -> dict[str, str]:
    """Write an experiment's pictures; returns their files in ``out`` by caption."""
    pictures = {}
    for number, (caption, spec) in enumerate(_pictures(outcome, specs)):
        name = f"{PICTURES}/{outcome.label}-{number + 1}.svg"
        svg = vl_convert.vegalite_to_svg(static(spec, caption))
        write_text(out / name, _renumbered(svg))
        pictures[caption] = name
    return pictures


def _read_remarks(log: Path) -> dict[str, str]:
    if not exists(log):
        return {}
    text = read_text(log)
    try:
        return read_remarks(text)
    except UserError as error:
        raise UserError(f"{log}, {error}") from error


def _renumbered(svg: str) -> str:
    """The picture with its clip paths numbered from 0; vl-convert numbers them through the whole
    process."""
    numbers: dict[str, int] = {}
    return re.sub(r"\bclip(\d+)", lambda m: f"clip{numbers.setdefault(m[1], len(numbers))}", svg)


def _figures(outcome: Outcome) -> Iterator[tuple[str, Spec]]:
    """Every figure that an experiment has the numbers for, by caption; the most important ones first."""
    made = [
        (
            "Effects on the final loss: intervals that hold for all effects together",
            effects.effects(outcome),
        ),
        *effects.pairs(outcome),
        ("Final loss against peak learning rate", curves.learning_rates(outcome)),
        ("Final loss against training time and size", curves.pareto(outcome)),
        (
            "Final loss against the baseline: intervals of the verdicts"
            + (" over the band of the margin" if outcome.record.margin is not None else ""),
            curves.finals(outcome),
        ),
        ("Validation loss: mean and range over seeds", curves.curves(outcome)),
        (
            "Difference to the baseline along the run: mean and 95 % band",
            curves.differences(outcome),
        ),
        ("Loss by position in the window", curves.positions(outcome)),
        *precision.quantization(outcome),
        ("Speed", cost.speeds(outcome)),
        ("Memory", cost.memories(outcome)),
        *(
            (f"{name.capitalize()}, one seed of every arm", spec)
            for name, spec in curves.steps(outcome)
        ),
    ]
    for caption, spec in made:
        if spec is not None:
            yield caption, spec


def _pictures(outcome: Outcome, specs: dict[str, Spec]) -> Iterator[tuple[str, Spec]]:
    """The figures of the log: those that need no interaction, under every condition."""
    for caption, spec in specs.items():
        if "one seed of every arm" in caption:
            continue
        chosen = {p.get("name") for p in spec.get("params", [])}
        if "condition" not in chosen or len(outcome.conditions) == 1:
            yield caption, spec
            continue
        for condition in outcome.conditions:
            yield qualified_name(caption, condition), condition_of(spec, condition)
