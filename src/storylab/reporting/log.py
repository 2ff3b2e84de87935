"""EXPERIMENTS.md: the log, with the record's structure, made from run folders alone."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np

from storylab.config import PRESENTATION_FIELDS, preset_config, to_dict
from storylab.errors import UserError
from storylab.experiments.comparison import DIVERGED, Comparison
from storylab.experiments.factors import SEED_FIELDS, under
from storylab.experiments.outcome import CellResult, Outcome
from storylab.experiments.verdicts import detail_lines, nats, ratio_text, verdict_line
from storylab.files import open_file
from storylab.record.folder import LOG
from storylab.record.run import Run
from storylab.reporting.observations import expectation_text, observations
from storylab.reporting.series import low_precision_share, mean_of, training_seconds
from storylab.training.lines import duration, printable, summary_lines

BEGIN_REMARKS, END_REMARKS = "<!-- remarks: {} -->", "<!-- end of remarks -->"
REMARKS_HINT = "*Write remarks here; they stay when this file is made again.*"
MISSING = "not measured"
OPTIMIZER_WORDS = {
    "adamw": "",
    "muon": "Muon for the blocks' matrices, else ",
    "normuon": "NorMuon for the blocks' matrices, else ",
}
# Where the table of a precision experiment says how much of the work is in low precision.
PRECISION_COLUMN = 4


@dataclass(frozen=True)
class Section:
    """An experiment's outcome with the files of its pictures, by their captions."""

    outcome: Outcome
    pictures: Mapping[str, str]


def read_remarks(text: str) -> dict[str, str]:
    """Hand-written remarks of an earlier log, by experiment.

    Raises:
        UserError: some are not between their markers, and would be lost.
    """
    pattern = re.escape(BEGIN_REMARKS).replace(re.escape("{}"), "(.*?)")
    # No marker within: one that lost its end must not swallow the sections after it.
    body = r"((?:(?!<!-- (?:remarks:|end of remarks)).*\n)*?)"
    found = re.findall(f"{pattern}\n{body}{re.escape(END_REMARKS)}", text)
    begun = [
        (number, match[1])
        for number, line in enumerate(text.splitlines(), start=1)
        if (match := re.fullmatch(pattern, line.strip()))
    ]
    whole = [label for label, _ in found]
    for number, label in begun:
        if [name for _, name in begun].count(label) != whole.count(label):
            raise UserError(
                f"line {number}: the remarks on {label} are not between a line "
                f"{BEGIN_REMARKS.format(label)} and a line {END_REMARKS}: mend that, or they would be lost"
            )
    remarks = {label: body.strip("\n") for label, body in found}
    return {k: v for k, v in remarks.items() if v.strip() and v.strip() != REMARKS_HINT}


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
    lines = [
        "# TinyStories training experiments",
        "",
        "Made from run folders by `storylab experiment report`; only the remarks are written by hand. "
        "Final losses are nats per token on the whole validation split, under the final weights, or "
        "their average where a run keeps one, in "
        "windows as long as those of training that run through the stories in turn; losses along a run "
        "are its estimates on a few fixed windows. Every figure is measured in the runs unless it is "
        "called predicted; what was not measured is said to be missing. Arms of an "
        "experiment share initial weights (where shapes allow), data order and evaluation windows; "
        "intervals are 95 %, over paired seeds unless stated, and verdicts are corrected for the number "
        "of comparisons in their experiment.",
        "",
        f"The same with zoom, hover and every figure: [{page}]({page}).",
        "",
        *_overview(sections),
        "",
        "## Setup",
        "",
        *_setup(sections),
    ]
    for problem in problems:
        lines += ["", f"**Cannot be read:** {problem}"]
    for section in sections:
        label = section.outcome.label
        lines += ["", *_section(section), ""]
        lines += [BEGIN_REMARKS.format(label), remarks.get(label, REMARKS_HINT), END_REMARKS]
    lines += ["", "## Conclusions", "", *_conclusions(sections)]
    kept = [label for label in remarks if label not in {s.outcome.label for s in sections}]
    for label in kept:
        lines += ["", f"## Remarks on {label}, which has no record here", ""]
        lines += [BEGIN_REMARKS.format(label), remarks[label], END_REMARKS]
    return "\n".join(lines) + "\n"


def repeat_command(outcome: Outcome) -> str:
    """The command that trains the same experiment again."""
    record = outcome.record
    seeds = {run.config.seed for run in outcome.runs}
    scale = f" --scale {record.scale}" if record.scale else ""
    count = f" --seeds {len(seeds)}" if seeds and len(seeds) != len(record.seeds) else ""
    planned = list(dict.fromkeys(cell.arm.name for cell in outcome.cells if cell.planned))
    some = planned and len(planned) < len(record.arms)
    only = f" --only {shlex.join(planned)}" if some else ""
    return f"storylab experiment run {shlex.quote(record.file)}{scale}{count}{only}"


def table_rows(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Headings and a row for every arm: loss, difference, speed, memory, time, verdict."""
    headings = [
        "arm",
        "parameters",
        "tokens",
        "epochs",
        "val loss",
        "difference (95 % CI)",
        "tok/s",
        "speed",
        "memory",
        "training time",
        "energy",
        "seeds",
        "verdict",
    ]
    comparisons = {(c.condition, c.arm): c for c in outcome.comparisons}
    rows = []
    for cell in outcome.cells:
        c = comparisons.get((cell.condition, cell.arm.name))
        rows.append(_row(cell, c))
    if outcome.factor == "precision":
        headings.insert(PRECISION_COLUMN, "low precision")
        for row, cell in zip(rows, outcome.cells, strict=True):
            share = low_precision_share(cell)
            row.insert(PRECISION_COLUMN, "" if share is None else f"{share:.0%} of FLOPs")
    return headings, rows


def _row(cell: CellResult, c: Comparison | None) -> list[str]:
    runs = cell.arm.finished
    states = ", ".join(dict.fromkeys(run.state for run in cell.arm.runs if not run.finished))
    if not runs:
        # From the verdict's column on there is nothing but how it ended.
        return [cell.name, *[""] * 10, f"0 of {cell.planned}", states or "no run"]
    speed = mean_of(cell.arm, lambda run: run.speed)
    memory = mean_of(cell.arm, lambda run: run.training_memory)
    seconds = mean_of(cell.arm, training_seconds)
    energy = mean_of(cell.arm, lambda run: run.results.energy_joules)
    losses = cell.arm.losses
    spread = f" ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
    ratio = ""
    if c and c.speed:
        ratio = (
            "confounded" if c.speed_confounds else ratio_text(c.speed, "faster", "slower", "speed")
        )
    return [
        cell.name,
        f"{runs[0].parameters:,}",
        f"{runs[0].results.tokens:,}",
        f"{runs[0].results.epochs:.2f}",
        f"{float(np.mean(losses)):.4f}{spread}",
        _difference(c),
        f"{speed:,.0f}{' (emulated)' if runs[0].results.emulated else ''}" if speed else MISSING,
        ratio if c else "baseline",
        f"{memory / 1e9:.2f} GB" if memory else MISSING,
        duration(seconds) if seconds else MISSING,
        f"{energy / 3600:.1f} Wh" if energy else MISSING,
        f"{len(runs)} of {cell.planned}" if len(runs) < cell.planned else str(len(runs)),
        c.verdict if c else "baseline",
    ]


def _difference(c: Comparison | None) -> str:
    if c is None:
        return "baseline"
    if c.confounds or c.recipes is None or c.verdict == DIVERGED:
        return ""
    r = c.recipes
    unpaired = "" if c.paired else ", unpaired"
    return f"{r.estimate:+.4f} ({r.low:+.4f} to {r.high:+.4f}{unpaired})"


def headline(outcome: Outcome) -> str:
    """An experiment's verdict in one sentence."""
    if not outcome.comparisons:
        losses = outcome.baseline_of(outcome.conditions[0]).arm.losses
        if not losses:
            return "No finished run yet."
        spread = (
            f" ± {np.std(losses, ddof=1):.4f} over {len(losses)} seeds" if len(losses) > 1 else ""
        )
        return f"Baseline: validation loss {float(np.mean(losses)):.4f}{spread}."
    kinds: dict[str, list[str]] = {}
    for c in outcome.comparisons:
        shown = c.recipes and not c.confounds and c.verdict != DIVERGED
        difference = f" ({nats(c.recipes.estimate)})" if c.recipes and shown else ""
        kinds.setdefault(c.verdict, []).append(under(c.arm, c.condition) + difference)
    told = "; ".join(f"{kind}: {', '.join(arms)}" for kind, arms in kinds.items())
    return f"Against {outcome.baseline}, in nats: {told}."


def _overview(sections: Sequence[Section]) -> Iterable[str]:
    yield "| experiment | scale | baseline loss | arms | seeds | verdicts |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for section in sections:
        o = section.outcome
        losses = o.baseline_of(o.conditions[0]).arm.losses
        seeds = {run.config.seed for run in o.runs if run.finished}
        cells = [
            f"[{_plain(o.record.title)}](#{_anchor(o.label)})",
            o.record.scale or "-",
            f"{float(np.mean(losses)):.4f}" if losses else "none yet",
            str(len({cell.arm.name for cell in o.cells})),
            str(len(seeds)),
            _plain(headline(o)),
        ]
        yield _line(cells)


def _setup(sections: Sequence[Section]) -> Iterable[str]:
    """What the runs say of machine, software, data, model and recipe; each variant once."""
    runs = {run.folder: run for section in sections for run in section.outcome.runs}
    if not runs:
        yield "No runs."
        return
    facts: dict[str, list[str]] = {}
    for run in runs.values():
        for name, value in _facts(run):
            values = facts.setdefault(name, [])
            if value not in values:
                values.append(value)
    yield "| what | value |"
    yield "| --- | --- |"
    for name, values in facts.items():
        shown = "; ".join(values[:6]) + (f"; and {len(values) - 6} more" if len(values) > 6 else "")
        yield _line([name, shown])


def _facts(run: Run) -> Iterable[tuple[str, str]]:
    e, c, data = run.environment, run.config, run.data
    memory = f", {e.memory_bytes / 1e9:.0f} GB"
    yield "machine", f"{e.processor} ({e.cpu}), {e.cores} cores{memory}"
    yield "device", e.gpu or f"{e.device}, {e.threads} threads"
    yield "software", f"storylab {e.storylab}, torch {e.packages.torch}, Python {e.python}"
    commits = sorted({stage.git_commit[:12] for stage in run.stages if stage.git_commit})
    version = ", ".join(sorted({stage.code_sha256[:12] for stage in run.stages}))
    yield "code", version + (f" (git {', '.join(commits)})" if commits else "")
    tokens = ", ".join(f"{count:,} {name} tokens" for name, count in data.tokens.items())
    yield (
        "data",
        f"{tokens}, {data.tokenizer.name} tokenizer of {data.tokenizer.vocab_size:,} ids, "
        f"fingerprint {data.fingerprint[:12]}",
    )
    m = c.model
    parameters = m.parameter_count(data.tokenizer.vocab_size)
    yield (
        "models",
        f"{c.preset}: {m.n_layer} layers, width {m.n_embd}, {m.n_head} query and {m.n_kv_head} "
        f"key/value heads, hidden {m.n_hidden}, {parameters:,} parameters",
    )
    yield "batch", f"{c.tokens_per_iteration:,} tokens an iteration, in windows of {c.block_size:,}"
    yield (
        "optimizer",
        ("" if c.method == "record" else f"method {c.method}: ")
        + OPTIMIZER_WORDS[c.optimizer]
        + f"AdamW, betas ({c.beta1:g}, {c.beta2:g}), weight decay {c.weight_decay:g}, gradient norm "
        f"clipped at {c.grad_clip:g}"
        + (
            f"; weights averaged over about {c.average_share:.0%} of the run"
            if c.average_share
            else ""
        )
        + (f"; half windows in the first {c.short_share:.0%}" if c.short_share else ""),
    )


def section_title(outcome: Outcome) -> str:
    """``Experiment 4: Sliding-window attention``, the number from the file's name."""
    number = re.match(r"0*(\d+)-", outcome.record.name)
    kind = f"Experiment {number[1]}" if number else "Experiment"
    return f"{kind}: {outcome.record.title}"


def _anchor(label: str) -> str:
    """An id of our own: two experiments, or two scales of one, may have the same title."""
    return "experiment-" + re.sub(r"[^\w\-]+", "-", label.lower())


def _section(section: Section) -> Iterable[str]:
    o, record = section.outcome, section.outcome.record
    runs = o.runs
    dates = sorted(run.environment.started[:10] for run in runs)
    span = dates[0] if dates and dates[0] == dates[-1] else " to ".join(dates[:1] + dates[-1:])
    yield f'<a id="{_anchor(o.label)}"></a>'
    yield ""
    yield f"## {_plain(section_title(o))}"
    yield ""
    yield f"**{_plain(headline(o))}**"
    yield ""
    yield f"- Date: {span or 'not run yet'}"
    yield f"- Purpose: {record.purpose}"
    if record.hypothesis:
        yield f"- Hypothesis: {record.hypothesis}"
    if record.note:
        yield f"- Scale: {record.scale or 'as in the file'}. {record.note}"
    yield f"- Factor: {record.factor or 'none'}; baseline: {o.baseline}"
    yield f"- Config of the baseline: {_config_line(o.baseline_of(o.conditions[0]))}"
    yield f"- Repeat: `{repeat_command(o)}`"
    for problem in o.problems:
        yield f"- **Not in the comparison:** {problem}"
    pictures = list(section.pictures.items())
    for caption, file in pictures[:1]:
        yield ""
        yield f"![{_plain(caption)}]({quote(file)})"
    yield ""
    headings, rows = table_rows(o)
    yield _line(headings)
    yield _line(["---"] * len(headings))
    yield from (_line(map(_plain, row)) for row in rows)
    yield ""
    yield (
        "Figures in this table are measured. ± is the standard deviation over seeds; the difference is "
        "that of the paired seeds alone. tok/s is that of the median iteration, memory the peak of "
        "training steps, before any evaluation."
    )
    yield ""
    yield from _stories(o)
    yield ""
    yield "**Key observations**"
    yield ""
    yield from (f"- {_plain(text)}" for text in observations(o))
    yield from _folded("Every comparison in full", _comparison_lines(o))
    if len(pictures) > 1:
        lines = [
            part
            for caption, file in pictures[1:]
            for part in (f"![{_plain(caption)}]({quote(file)})", "")
        ]
        yield from _folded("More figures", lines, code=False)
    yield from _folded("Training lines and results of the baseline, first seed", _training_lines(o))


def _config_line(cell: CellResult) -> str:
    """The flags that train it: those of its fields that are not the default of its preset."""
    default = to_dict(preset_config(cell.config.preset))
    values = to_dict(cell.config)
    default |= default.pop("model")
    values |= values.pop("model")
    flags = [f"--preset {cell.config.preset}", f"--dtype {cell.config.dtype}"]
    for name, value in values.items():
        hidden = {"preset", "dtype", "device", *PRESENTATION_FIELDS, *SEED_FIELDS}
        if value != default[name] and name not in hidden:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            flags.append(f"--{name} {shlex.quote(shown)}" if value is not True else f"--{name}")
    return f"`{' '.join(flags)}`"


def _stories(o: Outcome) -> Iterable[str]:
    """The same prompt and sampling seed, the baseline beside the arm that differs most from it."""
    condition = o.conditions[-1]
    baseline = o.baseline_of(condition).arm
    others = [cell.arm for cell in o.arms(condition) if cell.arm.name != o.baseline]
    ready = [arm for arm in others if arm.finished]
    if not baseline.finished:
        return
    chosen = [baseline]
    if ready:
        least = float(np.mean(baseline.losses))
        chosen.append(max(ready, key=lambda arm: abs(float(np.mean(arm.losses)) - least)))
    yield "**Generation sample**, the same prompt and sampling seed:"
    for arm in chosen:
        run = arm.finished[0]
        sample = run.results.samples[0]
        yield ""
        name = _plain(f"{under(arm.name, condition)}, seed {run.config.seed}")
        yield f"> **{name}:** {_quoted(sample.text)}"


def _quoted(text: str, most: int = 420) -> str:
    """A story as one line of a quotation, shortened, with nothing that markdown would obey."""
    line = " ".join(printable(text).split())
    line = line if len(line) <= most else line[:most].rsplit(" ", 1)[0] + " ..."
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", line)


def _plain(text: str) -> str:
    """Text in which markdown finds nothing to obey: window:64*3 has asterisks, a title may have tags."""
    return text.replace("*", "\\*").replace("<", "&lt;")


def _comparison_lines(o: Outcome) -> list[str]:
    lines = []
    for c in o.comparisons:
        lines += [verdict_line(c), *(f"  {line}" for line in detail_lines(c)), ""]
    return lines[:-1]


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


def _folded(summary: str, lines: Sequence[str], code: bool = True) -> Iterable[str]:
    if not lines:
        return
    yield ""
    yield f"<details><summary>{summary}</summary>"
    yield ""
    fence = ["```text"], ["```"]
    yield from fence[0] if code else []
    yield from lines
    yield from fence[1] if code else []
    yield ""
    yield "</details>"


def _conclusions(sections: Sequence[Section]) -> Iterable[str]:
    for section in sections:
        o = section.outcome
        yield f"- **{o.record.title}.** {_plain(headline(o))}"
        yield from (f"  - {_plain(expectation_text(check))}" for check in o.expectations)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
