"""Pages that are made from the code are up to date, quoted messages exist, and the site builds."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_that_of_the_code() -> None:
    reference = script("make_reference")
    for name, page in reference.PAGES.items():
        written = (DOCS / "reference" / name).read_text(encoding="utf-8")
        assert written == page(), "run python docs/make_reference.py"


def messages() -> list[str]:
    """Every text in the source, with … for the values that are put into it."""
    texts = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", "") for part in node.values)
                text = "".join(part if isinstance(part, str) else "…" for part in parts)
                texts.append(re.sub("…+", "…", text))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_troubleshooting_quotes_messages_that_exist() -> None:
    page = (DOCS / "guide/troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:`` (.*?) ``|`(.*?)`) \| ", page, re.MULTILINE)
    quoted = [double or single for double, single in rows]
    assert len(quoted) > 25
    texts = messages()
    missing = [quote for quote in quoted if not any(quote in text for text in texts)]
    assert missing == []


def test_every_page_is_on_the_site() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"- (\S+\.md)$", config, re.MULTILINE)
    pages = {path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")}
    assert pages <= set(listed) and len(listed) == len(set(listed))
    assert all((ROOT / page).is_file() for page in listed)


@pytest.mark.slow
def test_the_site_builds_and_a_broken_link_ends_the_build(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="the extra docs is not installed")
    build = [sys.executable, str(DOCS / "make_site.py"), "--out", str(tmp_path / "docs")]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    site = tmp_path / "docs/site"
    for page in ("index.html", "docs/guide/first-run.html", "docs/reference/cli.html"):
        text = (site / page).read_text(encoding="utf-8")
        # The browser loads nothing from elsewhere.
        loaded = re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?([^\">\s]+)", text)
        assert loaded and not [address for address in loaded if "//" in address]
    assert (site / "docs/notebooks/first-run.ipynb").is_file()
    with (tmp_path / "docs/pages/README.md").open("a") as file:
        file.write("\n[a link](nowhere.md)\n")
    again = [sys.executable, "-m", "zensical", "build", "--strict"]
    assert subprocess.run(again, cwd=tmp_path / "docs", capture_output=True).returncode != 0


def test_the_tests_of_an_integration_exist() -> None:
    named = set(re.findall(r"`(tests/[^`]+)`", (ROOT / "docs/integrations.md").read_text()))
    assert len(named) > 10 and all((ROOT / path).exists() for path in named)
