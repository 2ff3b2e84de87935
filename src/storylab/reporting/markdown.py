"""EXPERIMENTS.md: the log of a folder of experiments, filled into the template ``log.md.j2``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
from jinja2 import Template

from storylab.config import PRESENTATION_FIELDS, SEED_FIELDS, flags_of
from storylab.errors import UserError
from storylab.experiments.effect_words import verdict_lines
from storylab.experiments.factors import qualified_name
from storylab.experiments.outcome import Outcome
from storylab.files import open_file
from storylab.record.experiment_schema import ExperimentRecord
from storylab.record.folder import LOG
from storylab.record.run import Run
from storylab.reporting.arms import (
    headline,
    plan_text,
    repeat_command,
    section_title,
    table_rows,
)
from storylab.reporting.effects import effect_table, factor_text, verdicts_in_full
from storylab.reporting.observations import observations
from storylab.reporting.observations.expectation import expectation_text
from storylab.reporting.remarks import BEGIN_REMARKS, END_REMARKS, REMARKS_HINT
from storylab.reporting.setup_facts import setup_facts
from storylab.reporting.templates import text_template
from storylab.training.log_format import printable, summary_lines

# Fields that differ between runs of an arm, or between machines.
HIDDEN_FLAGS = PRESENTATION_FIELDS | SEED_FIELDS | {"device"}


@dataclass(frozen=True)
class Section:
    """An experiment's outcome with the files of its pictures, by their captions, and the lines on the
    choices behind it."""

    outcome: Outcome
    pictures: Mapping[str, str]
    choices: Sequence[str] = ()


def markdown(
    sections: Sequence[Section], problems: Sequence[str], remarks: Mapping[str, str], page: str
) -> str:
    """The whole log.

    Args:
        sections: the experiments in order.
        problems: records that could not be read, a line each.
        remarks: hand-written remarks to keep, by experiment.
        page: file name of the page, to link to.
    """
    shown = {section.outcome.label for section in sections}
    return _template().render(
        page=page,
        sections=[_view(section, remarks) for section in sections],
        facts=list(setup_facts(section.outcome for section in sections)),
        problems=problems,
        kept=[(label, text) for label, text in remarks.items() if label not in shown],
        begin_remarks=BEGIN_REMARKS,
        end_remarks=END_REMARKS,
    )


def _template() -> Template:
    return text_template(
        "storylab.reporting",
        "log.md.j2",
        {
            "plain": plain,
            "row": _row,
            "unwrap": _unwrap,
            "paragraphs": lambda text: "\n\n".join(map(_unwrap, text.strip().split("\n\n"))),
            "url": quote,
            "code": _code,
            "fence": _fence,
        },
    )


def _unwrap(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class _SectionView:
    """The values of an experiment's section, named as in the template."""

    record: ExperimentRecord
    label: str
    title: str
    anchor: str
    headline: str
    overview: list[str]
    dates: str
    plan: str
    choices: Sequence[str]
    flags: str
    repeat: str
    problems: Sequence[str]
    pictures: list[tuple[str, str]]
    factor: str
    headings: list[str]
    rows: list[list[str]]
    effects: tuple[list[str], list[list[str]]]
    samples: list[tuple[str, str]]
    verdicts: list[str]
    observations: list[str]
    comparisons: list[str]
    training_lines: list[str]
    expectations: list[str]
    remarks: str


def _view(section: Section, remarks: Mapping[str, str]) -> _SectionView:
    o = section.outcome
    headings, rows = table_rows(o)
    return _SectionView(
        record=o.record,
        label=o.label,
        title=section_title(o),
        anchor=_anchor(o.label),
        headline=headline(o),
        overview=_overview(o),
        dates=_dates(o.runs),
        plan=plan_text(o),
        choices=section.choices,
        flags=shlex.join(flags_of(o.baseline_of(o.conditions[0]).config, HIDDEN_FLAGS)),
        repeat=repeat_command(o),
        problems=o.problems,
        pictures=list(section.pictures.items()),
        factor=factor_text(o),
        headings=headings,
        rows=rows,
        effects=effect_table(o),
        samples=list(_samples(o)),
        verdicts=verdict_lines(o),
        observations=observations(o),
        comparisons=_comparison_lines(o),
        training_lines=_training_lines(o),
        expectations=[expectation_text(check) for check in o.expectations],
        remarks=remarks.get(o.label, REMARKS_HINT),
    )


def _overview(o: Outcome) -> list[str]:
    """The experiment's row in the first table."""
    losses = o.baseline_of(o.conditions[0]).arm.losses
    return [
        f"[{plain(o.record.title)}](#{_anchor(o.label)})",
        plain(o.record.scale or "-"),
        f"{float(np.mean(losses)):.4f}" if losses else "none yet",
        str(len({cell.arm.name for cell in o.cells})),
        str(len({run.config.seed for run in o.runs if run.finished})),
        plain(headline(o)),
    ]


def _dates(runs: Sequence[Run]) -> str:
    """``2026-11-01 to 2026-11-03``, from the first start to the last; empty without runs."""
    dates = sorted({run.environment.started[:10] for run in runs})
    return " to ".join(dict.fromkeys(dates[:1] + dates[-1:]))


def _anchor(label: str) -> str:
    """The section's id, as two experiments, or two scales of one, may have the same title."""
    return "experiment-" + re.sub(r"[^\w\-]+", "-", label.lower())


def _samples(o: Outcome) -> Iterator[tuple[str, str]]:
    """A story by the baseline, and one by the arm whose loss differs most from it: the same prompt and
    sampling seed."""
    condition = o.conditions[-1]
    baseline = o.baseline_of(condition).arm
    if not baseline.finished:
        return
    arms = [cell.arm for cell in o.arms(condition) if cell.arm.name != o.baseline]
    least = float(np.mean(baseline.losses))
    ready = [arm for arm in arms if arm.finished]
    furthest = max(ready, key=lambda arm: abs(float(np.mean(arm.losses)) - least), default=None)
    for arm in (baseline, furthest) if furthest else (baseline,):
        run = arm.finished[0]
        name = f"{qualified_name(arm.name, condition)}, seed {run.config.seed}"
        yield name, _quoted(run.results.samples[0].text)


def _quoted(text: str, most: int = 420) -> str:
    """A story as one line of a quotation, shortened, with markdown's syntax escaped."""
    line = " ".join(printable(text).split())
    line = line if len(line) <= most else line[:most].rsplit(" ", 1)[0] + " ..."
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", line)


def plain(text: str) -> str:
    """Text as one line without control characters, Markdown's syntax except code escaped: window:64*3 has
    asterisks, a title may have tags or links."""
    line = _unwrap(printable(text)).replace("*", "\\*").replace("<", "&lt;")
    return re.sub(r"\](?=[\[(:])", r"\\]", line)


def _code(text: str) -> str:
    """Text as code within a line."""
    line = _unwrap(printable(text))
    mark = "`" * (_longest_ticks(line) + 1)
    return f"{mark} {line} {mark}" if "`" in line else f"`{line}`"


def _fence(lines: Iterable[str]) -> str:
    """A fence that no line within it can end."""
    return "`" * max(3, _longest_ticks("\n".join(lines)) + 1)


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _comparison_lines(o: Outcome) -> list[str]:
    texts = verdicts_in_full(o)
    return "\n\n".join("\n  ".join(lines) for lines in texts).splitlines()


def _training_lines(o: Outcome) -> list[str]:
    arm = o.baseline_of(o.conditions[0]).arm
    run = arm.finished[0] if arm.finished else arm.runs[0] if arm.runs else None
    if run is None:
        return []
    try:
        with open_file(run.folder / LOG) as file:
            text = printable(file.read().decode("utf-8", "replace").replace("\r\n", "\n"))
    except UserError as error:
        return [str(error).replace(f"{run.folder.parent}/", "")]
    lines = text.partition("\nResults\n")[0].strip().splitlines()
    if run.finished:
        lines += ["", *(printable(line) for line in summary_lines(run.results))]
    return lines


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
