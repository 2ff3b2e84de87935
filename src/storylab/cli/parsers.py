"""Verbs as parsers of argparse, for the libraries that describe a command line from its parser."""

from __future__ import annotations

import argparse
import warnings

import tyro

from storylab.cli.registry import Verb, all_verbs


def verb_parser(verb: Verb) -> argparse.ArgumentParser:
    """The flags and operands of a verb; commands themselves are parsed by :mod:`storylab.flags`."""
    with warnings.catch_warnings():
        # tyro may remove it one day. Its own completion, which stays, completes no operands.
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(
            verb.command,
            prog=f"storylab {verb.name}",
            use_underscores=True,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """The whole command line: a subparser for each verb, and one in another for a verb of two words."""
    root = argparse.ArgumentParser(prog="storylab")
    root.add_argument("--version", action="version", version="storylab")
    words = root.add_subparsers()
    families = {}
    for verb in all_verbs():
        first, _, second = verb.name.partition(" ")
        place = words
        if second:
            if first not in families:
                families[first] = words.add_parser(first, help=f"{first} ...").add_subparsers()
            place = families[first]
        parents = [verb_parser(verb)]
        place.add_parser(second or first, help=verb.help, parents=parents, add_help=False)
    return root
