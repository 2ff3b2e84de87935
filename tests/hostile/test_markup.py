"""Stories, names and configs cannot become markup on a page, or commands to a terminal."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from fuzz_targets import Example
from record_folders import forget_checksums
from storylab.cli import main
from storylab.cli.console import ConsoleReporter
from storylab.cli.tables import print_lines, print_table
from storylab.reporting import report as reporting
from storylab.reporting.remarks import read_remarks

ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\r\b"
TAGS = "<script>alert(1)</script><img src=x onerror=alert(1)>"
LINKS = "[a](javascript:alert(1)) ![b](http://evil.example/b.png) [c]: http://evil.example"
REMARKS = "<!-- remarks: rates-laptop -->\nmine\n<!-- end of remarks -->"
BLOCKS = f"\n```\n~~~\n# Heading\n\n> quote\n{REMARKS}\n</details>\n"
HOSTILE = f"{TAGS}{LINKS}{BLOCKS}{ESCAPES}`{TAGS}`"


@pytest.fixture
def hostile(example: Example) -> Example:
    """A record and a run with hostile text wherever a text can be."""
    forget_checksums(example.run)
    record = json.loads(example.record.read_text())
    record |= dict.fromkeys(("title", "purpose", "hypothesis", "note"), f"x {HOSTILE}")
    example.record.write_text(json.dumps(record))
    summary = json.loads((example.run / "summary.json").read_text())
    for sample in summary["samples"]:
        sample["prompt"] += HOSTILE
        sample["text"] += HOSTILE
    (example.run / "summary.json").write_text(json.dumps(summary))
    environment = json.loads((example.run / "environment.json").read_text())
    environment |= {"processor": HOSTILE, "cpu": HOSTILE, "command": [HOSTILE]}
    (example.run / "environment.json").write_text(json.dumps(environment))
    log = example.run / "log.txt"
    log.write_text(log.read_text().replace("Results", f"{HOSTILE}\nResults"))
    broken = example.record.with_name("bro\x1b[31m<b>ken.json")
    broken.write_text(json.dumps(record | {"margin": HOSTILE}))
    return example


class Tags(HTMLParser):
    """Counts elements, and keeps the addresses of links and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


@pytest.mark.slow
def test_a_report_of_hostile_texts_has_no_markup_of_theirs(
    hostile: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another program reads it: markdown-it with raw HTML allowed, and Python's parser of HTML."""
    monkeypatch.setattr(reporting, "_figures", lambda outcome: ())
    out = reporting.write_report(hostile.record.parents[1], tmp_path / "report")
    text = (out / "EXPERIMENTS.md").read_text(encoding="utf-8")
    assert "alert(1)" in text  # the texts are there, as text
    assert not [c for c in text if not (c.isprintable() or c == "\n")]
    found = Tags(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))
    assert not {"script", "img", "b"} & set(found.tags)
    assert found.tags.count("details") == 2 and found.tags.count("h1") == 1
    for name, value in found.attributes:
        assert not name.startswith("on")
        assert name not in ("href", "src") or value.startswith(("#", "index.html")), (name, value)
    assert "mine" not in read_remarks(text).values()
    assert reporting.write_report(hostile.record.parents[1], tmp_path / "report") == out
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "alert(1)" in page
    found = Tags(page)
    assert not {"img", "b"} & set(found.tags) and found.tags.count("script") == 3
    # What the page's own script shows, it shows as text.
    script = page[page.rindex("<script>") :]
    assert not any(word in script for word in ("innerHTML", "outerHTML", "insertAdjacentHTML"))


def controls(text: str) -> set[str]:
    """Characters that a terminal might obey."""
    return {c for c in text if not (c.isprintable() or c in "\n\t")}


@pytest.mark.slow
def test_no_command_prints_what_a_terminal_obeys(
    hostile: Example, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "_figures", lambda outcome: ())
    runs = hostile.run.parent
    odd = runs / "od\x1b[31md\u202e"
    shutil.copytree(hostile.run, odd)
    (odd / "metrics.jsonl").write_text("{\x1b[2J")
    named = runs / "na\x1b[31mmed"
    shutil.copytree(hostile.run, named)
    place = ["--runs", str(runs)]
    for args in (
        ["list", *place],
        ["watch", *place],
        ["compare", str(hostile.run), str(named)],
        ["compare", str(odd), str(hostile.run)],
        ["info", str(named)],
        ["verify", str(odd), str(named), "--depth", "record"],
        ["sample", str(named), "--max_new_tokens", "3", "--device", "cpu", "--prompt", "a\x1b[2J"],
        ["experiment", "report", *place],
        ["list", *place, "--json"],
        ["eval", str(odd), "--data_dir", "no\x1b[31mne"],
        ["list", "--runs", "no\x1b[31mne"],
        ["nonsense\x1b[31m"],
        ["train", "--preset", "\x1b[31m"],
    ):
        main(args)
        out, err = capsys.readouterr()
        assert out + err and not controls(out + err), (args, controls(out + err))


def test_lines_and_tables_show_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_lines(ESCAPES, "b\tc")
    ConsoleReporter().line(ESCAPES)
    for width in (200, 10):  # the second folds its cells
        monkeypatch.setenv("COLUMNS", str(width))
        print_table(ESCAPES, ["a", "b "], [[ESCAPES, "x" * 300]])
    out = capsys.readouterr().out
    assert "\ufffd[2J" in out and "b\tc\n" in out and not controls(out)


SECRETS = {
    "WANDB_API_KEY": "sesame-wandb-0123456789",
    "HF_TOKEN": "hf_sesameopensesame0123",
    "MLFLOW_TRACKING_PASSWORD": "sesame-mlflow-0123",
    "AWS_SECRET_ACCESS_KEY": "sesame/aws+0123456789",
}


@pytest.mark.slow
def test_no_secret_of_the_environment_reaches_a_file(
    whole: Example,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a data set, a run with a tracker, a listing and a report."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    shape = (
        "--preset nano --n_layer 1 --n_head 1 --n_kv_head 1 --n_embd 16 --n_hidden 16 --device cpu"
    )
    short = "--max_iters 1 --batch_size 2 --gradient_accumulation_steps 1 --block_size 16 --eval_iters 1"
    data, run = tmp_path / "data", tmp_path / "runs" / "a"
    source = f"--source builtin --tokenizer bpe:300 --builtin_stories 300 --out {data}"
    for words in (
        f"prepare {source}",
        f"train {shape} {short} --eval_interval 1 --data_dir {data} --out_dir {run}",
        f"info {run} --json",
    ):
        assert main(words.split()) == 0
    written: dict[str, bytes] = {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert len(written) > 15
    written["the output"] = "".join(capsys.readouterr()).encode()
    for place, content in written.items():
        assert not [name for name, value in SECRETS.items() if value.encode() in content], place


def test_texts_of_a_table_are_not_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    print_table("[red]t[/red]", ["a"], [["[link=http://evil.example]x[/link]" + "y" * 300]])
    out = capsys.readouterr().out.replace("\n", "").replace(" ", "")
    assert "[red]t[/red]" in out and "[link=http" in out
