"""Prose is plain: words of dialect stay out of docs, docstrings and help.

`python tests/test_words.py` prints the allowance as it would be now. It must only shrink: rewrite a
sentence, then lower the number of its file or remove the line.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIALECT = re.compile(
    r"\banew\b|\balike\b|\bbeside\b|\bbut for\b|\bfor a person\b|\bforetells?\b"
    r"|\b(?:is|are|was|were|been) to be\b|\b(?:is|are|was|were|be|been|being|not) told\b"
    r"|\btold of\b|\btells of\b|\bat hand\b|\blies\b|\bstands?\b(?!-)|\bmend(?:s|ed)?\b"
    r"|\bheld against\b|\bgoes by\b|\bwhoever\b|\bsays? (?:nothing|more|less) of\b"
    r"|\bcut short\b|\bwhat a run\b|\bthe record's\b",
    re.IGNORECASE,
)
DOCSTRING_START = re.compile(r"What\b")  # a clause is no name for a thing
ALLOWANCE: dict[str, int] = {}


def prose(path: Path) -> Iterator[str]:
    """The text of a page; the docstrings and messages of a module."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield text
        return
    for node in ast.walk(ast.parse(text)):
        # Docstrings are help, and strings are messages.
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def docstrings(path: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds):
                yield ast.get_docstring(node) or ""


def pages() -> list[Path]:
    """Everything that users and contributors read, but for results and the changes of the past."""
    docs = [path for path in (ROOT / "docs").rglob("*.md") if "results" not in path.parts]
    return [*ROOT.glob("*.md"), *docs, *(ROOT / "src").rglob("*.py"), *ROOT.glob("*.py")]


def findings(path: Path) -> list[str]:
    words = [match[0] for text in prose(path) for match in DIALECT.finditer(text)]
    return words + [text[:40] for text in docstrings(path) if DOCSTRING_START.match(text)]


def counts() -> dict[str, int]:
    found = {path.relative_to(ROOT).as_posix(): len(findings(path)) for path in pages()}
    return {name: count for name, count in sorted(found.items()) if count}


def test_no_page_or_module_has_more_dialect_than_it_had() -> None:
    for name, count in counts().items():
        assert count <= ALLOWANCE.get(name, 0), f"{name}: {findings(ROOT / name)}"


def test_dialect_is_found(tmp_path: Path) -> None:
    module = tmp_path / "a.py"
    module.write_text('"""What is trained anew."""\n\n\ndef f():\n    """Plain."""\n')
    assert findings(module) == ["anew", "What is trained anew."]
    page = tmp_path / "a.md"
    page.write_text("A plan foretells; a run that is missing is told of.")
    assert findings(page) == ["foretells", "is told"]


if __name__ == "__main__":
    for name, count in counts().items():
        print(f'    "{name}": {count},')
