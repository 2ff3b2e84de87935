"""Builds the documentation's site with Zensical, from the pages as they are in the repository.

    python docs/make_site.py [--out build/docs]

The site is in ``site`` of that folder; open its ``index.html``.

The pages are copied with the folders that they have here, together with every file that one of them links
to, so a relative link is right both in the repository and on the site. A link or an anchor that leads
nowhere ends the build.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = "mkdocs.yml"
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def copy_pages(place: Path) -> None:
    """Copy the pages, and the files that they link to, into the new folder ``place``."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    linked = {
        (page.parent / target).resolve()
        for page in pages
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if "://" not in target
    }
    for path in {*pages, *(path for path in linked if path.is_file())}:
        copy = place / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs")
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    copy_pages(out / "pages")
    shutil.copyfile(ROOT / CONFIG, out / CONFIG)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    return subprocess.run(command, cwd=out).returncode


if __name__ == "__main__":
    sys.exit(main())
