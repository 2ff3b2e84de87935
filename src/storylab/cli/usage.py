"""The list of verbs that ``storylab --help`` prints."""

from __future__ import annotations

from itertools import groupby

from storylab.cli.registry import ListedVerb, family, listed_verbs

HEAD = "usage: storylab VERB [FLAGS]      (storylab VERB --help lists a verb's flags)"
EXAMPLES = """\
examples:
  storylab prepare --source builtin --tokenizer bpe:4096
  storylab train --preset nano --data_dir data/builtin-bpe4096 --out_dir runs/first
  storylab sample runs/first"""
# Width of the column of names: for verbs of one word, and for longer ones.
SHORT, LONG = 10, 24


def usage() -> str:
    """All verbs, group by group, with examples."""
    groups = [
        "\n".join(_line(verb) for verb in verbs)
        for _, verbs in groupby(listed_verbs(), key=lambda verb: verb.group)
    ]
    return "\n\n".join((HEAD, *groups, EXAMPLES)) + "\n"


def _line(verb: ListedVerb) -> str:
    shown = f"{verb.name} {verb.operand}".strip()
    return f"  {shown:<{SHORT if len(shown) < SHORT else LONG}}{verb.help}"


def family_usage(word: str) -> str:
    """List the verbs of two words that begin with ``word``, in one line."""
    seconds = (verb.name.partition(" ")[2] for verb in family(word))
    return f"usage: storylab {word} {'|'.join(seconds)} (each has --help)"
