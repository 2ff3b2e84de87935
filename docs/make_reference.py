"""Writes the pages of docs/reference from the code: every verb with its flags, every field of a config.

    python docs/make_reference.py

A test keeps the pages in step with the code.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from storylab.cli.parsers import verb_parser
from storylab.cli.registry import GROUPS, Verb, all_verbs, find_verb
from storylab.config import ModelConfig, TrainConfig
from storylab.config.marks import Effect, Group, Marks, marks_of

PLACE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/make_reference.py: change the code, not this page. -->\n"
TITLES = {"runs": "Data and runs", "experiments": "Experiments"}
# Flags of these nested dataclasses are the config's fields, which have a page of their own.
NESTED = ("config.", "model.")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; cells are one line each, and ``|`` and ``<`` in them are text."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(escaped, line))} |\n" for line in lines)


def escaped(cell: str) -> str:
    """A cell's text in one line."""
    return " ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;")


def code(values: Sequence[object]) -> str:
    """Values as code, with commas."""
    return ", ".join(f"`{value}`" for value in values)


def meaning_and_default(action: argparse.Action) -> tuple[str, str]:
    """The help of a flag without the default at its end, and that default."""
    text = " ".join((action.help or "").split())
    found = re.fullmatch(r"(.*?) ?\((required|default: .*?|optional|repeatable)\)", text)
    if not found:
        return text, ""
    return found[1], found[2].removeprefix("default: ")


def values_of(action: argparse.Action) -> str:
    """The values that a flag takes: choices, or a word for their type; empty for a switch."""
    if action.choices is not None:
        choices = [str(choice) for choice in action.choices]
        if "None" in choices:  # the parser's order is that of a set
            choices = sorted(set(choices) - {"None"})
        return code(choices)
    if action.nargs == 0 or not isinstance(action.metavar, str):
        return ""
    several = re.fullmatch(r"\[(\w+) \[.*", action.metavar)
    return f"`{several[1]} ...`" if several else f"`{action.metavar.removeprefix('{None}|')}`"


def flag_row(action: argparse.Action) -> list[str]:
    """A flag or operand as a row: names, values, default, meaning."""
    names = code(action.option_strings) if action.option_strings else f"`{action.metavar}`"
    meaning, default = meaning_and_default(action)
    values = values_of(action) if action.option_strings else ""
    return [names, values, "" if default in ("", "''", "None") else f"`{default}`", meaning]


def verb_section(verb: Verb) -> str:
    """A verb: purpose, examples, operands and flags."""
    parser = verb_parser(verb)
    text, _, examples = (inspect.getdoc(verb.command) or "").partition("Examples:")
    actions = [action for action in parser._actions if "--help" not in action.option_strings]
    own = [action for action in actions if not action.dest.startswith(NESTED)]
    lines = [" ".join(line.split()) for line in re.split(r"\s\|\s", examples) if line.strip()]
    parts = [f"### storylab {verb.name}\n", text.strip() + "\n"]
    if lines:
        parts.append("```console\n" + "\n".join(lines) + "\n```\n")
    if own:
        parts.append(table(("flag", "values", "default", "meaning"), [*map(flag_row, own)]))
    if len(own) < len(actions):
        parts.append(f"Also every flag of {config_link(actions)}.\n")
    return "\n".join(parts)


def config_link(actions: Sequence[argparse.Action]) -> str:
    """The part of the config's page that holds the nested flags of a verb."""
    if any(action.dest.startswith("config.") for action in actions):
        return "[the config](config.md)"
    return "[the model's shape](config.md#the-model)"


def cli_page() -> str:
    """docs/reference/cli.md."""
    parts = [
        f"# Verbs and flags\n\n{NOTE}",
        "[Command line](../guide/command-line.md) has exit codes and shell completion. Flags may be "
        "written with hyphens or underscores.\n",
    ]
    for group in GROUPS:
        parts.append(f"## {TITLES[group]}\n")
        parts += [verb_section(verb) for verb in all_verbs() if verb.group == group]
    return "\n".join(parts)


def config_rows(kind: type[TrainConfig] | type[ModelConfig]) -> Iterator[list[str]]:
    """The fields of a config as rows, with the facts in their marks."""
    actions = {
        action.dest.rpartition(".")[2]: action
        for action in verb_parser(find_verb("train"))._actions
    }
    for name, marks in marks_of(kind).items():
        _, values, default, meaning = flag_row(actions[name])
        groups = [group for group in get_args(Group) if group in marks.groups]
        yield [f"`{name}`", values or "`true`, `false`", default, meaning + notes(marks),
               ", ".join(groups), marks.effect]  # fmt: skip


def notes(marks: Marks) -> str:
    """Facts about a field that only some have."""
    found = ""
    if marks.formerly:
        found += f" Formerly `{marks.formerly}`."
    if marks.set_by:
        found += f" In an experiment file: {marks.set_by}."
    return found


def config_page() -> str:
    """docs/reference/config.md."""
    head = ("field", "values", "default", "meaning", "part of the recipe", "changes")
    effects = ", ".join(f"`{effect}`" for effect in get_args(Effect))
    return "\n".join(
        [
            f"# Every setting of a run\n\n{NOTE}",
            "These are the fields of `TrainConfig`. Each is a flag of `storylab train` "
            "(`--learning_rate 3e-3`; `--no_compile` for a switch), a key of `[config]` and of arms in an "
            "[experiment file](../guide/experiments.md), and a key of a run's `config.json`. The defaults "
            "are those of preset `113m` and method `record`; `--preset` and `--method` set others.\n",
            "A factor of an experiment covers the fields of its part of the recipe. The last column says "
            f"what a field can change: {effects}. A resumed run may change the last kind alone, and a "
            "longer `max_iters` where no past learning rate changes.\n",
            f"## Training\n\n{table(head, [*config_rows(TrainConfig)])}",
            f"## The model\n\n{table(head, [*config_rows(ModelConfig)])}",
        ]
    )


PAGES = {"cli.md": cli_page, "config.md": config_page}


def main() -> None:
    PLACE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (PLACE / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
