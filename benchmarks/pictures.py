"""Make the README's pictures: a page of a report and a terminal with a training run.

Needs the test extra (playwright) and a chromium on the path; takes about three minutes on two CPU cores:

    python benchmarks/pictures.py [--out docs/pictures] [--page docs/results/index.html]
"""

from __future__ import annotations

import argparse
import io
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

# The README's first run, with a line every 100 iterations.
COMMANDS = (
    "storylab train --preset nano --data_dir data/builtin-bpe1024 --out_dir runs/first "
    "--batch_size 16 --gradient_accumulation_steps 1 --learning_rate 3e-3 --warmup_iters 50 "
    "--max_iters 600 --eval_interval 300 --eval_iters 5",
    'storylab sample runs/first --prompt "One day, Tom" --samples 1 --temperature 0.7 --top_p 0.95',
)
PREPARE = "storylab prepare --source builtin --tokenizer bpe:1024"
WIDTH = 104  # columns
PAGE_WIDTH, PAGE_HEIGHT = 1040, 760  # pixels
SECTION, CONDITION = "04-sliding-window-laptop", "1024 tokens"
FIGURES = 2  # that the picture shows


def output(command: str, folder: Path) -> str:
    """Run a storylab command in ``folder`` and return its standard output."""
    words = [sys.executable, "-m", *shlex.split(command)]
    answer = subprocess.run(words, cwd=folder, capture_output=True, check=True, encoding="utf-8")
    return answer.stdout


def shortened(text: str) -> str:
    """A run's output up to its samples, marked if they follow."""
    before, samples, _ = text.partition("\nSample for ")
    return f"{before.rstrip()}\n..." if samples else before.rstrip()


def terminal(out: Path) -> None:
    """Run the commands in a temporary folder and draw them as an SVG without fonts from elsewhere."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), legacy_windows=False)
    with tempfile.TemporaryDirectory() as folder:
        output(PREPARE, Path(folder))
        for command in COMMANDS:
            console.print(Text("$ " + command, style="bold"))
            console.print(Text(shortened(output(command, Path(folder)))))
    svg = console.export_svg(title="storylab")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    (out / "terminal.svg").write_text(svg, encoding="utf-8", newline="\n")


def page(source: Path, out: Path) -> None:
    """Take a picture of an experiment's verdict and first figures in a report's page."""
    from playwright.sync_api import ViewportSize, sync_playwright

    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if binary is None:
        raise SystemExit("there is no chromium on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        size: ViewportSize = {"width": PAGE_WIDTH, "height": PAGE_HEIGHT}
        view = browser.new_page(viewport=size, color_scheme="light")
        view.goto(source.resolve().as_uri())
        section = view.locator(f"[id='{SECTION}']")
        section.get_by_role("combobox").first.select_option(label=CONDITION)
        section.evaluate("section => section.scrollIntoView()")
        for figure in section.locator("figure").all()[:FIGURES]:
            figure.locator("canvas, svg").first.wait_for()
        view.screenshot(path=out / "page.png")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/index.html"))
    parser.add_argument("--only", choices=("page", "terminal"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only != "terminal":
        page(args.page, args.out)
    if args.only != "page":
        terminal(args.out)


if __name__ == "__main__":
    main()
