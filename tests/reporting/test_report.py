"""The report: made from run folders alone, the same bytes every time, and usable in a browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from executors import train_here
from storylab.cli import main
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.experiments.outcome import load_outcome
from storylab.experiments.plan import plan_runs
from storylab.experiments.recording import write_record
from storylab.experiments.spec import load_experiment
from storylab.record.folder import SUMMARY
from storylab.record.run import Run
from storylab.record.schema import EvaluationRow
from storylab.reporting.figures.curves import finals
from storylab.reporting.observations import observations
from storylab.reporting.observations.run import spikes
from storylab.reporting.remarks import read_remarks
from storylab.reporting.report import write_report
from storylab.reporting.tables import curve_rows, difference_rows

pytestmark = pytest.mark.slow
HEAD = """
purpose = "To test the report."
hypothesis = "None | of <b>note</b>."
seeds = [1, 2]
[config]
preset = "nano"
n_layer = 2
n_head = 1
n_kv_head = 1
n_embd = 16
n_hidden = 16
dtype = "float32"
max_iters = 16
batch_size = 4
gradient_accumulation_steps = 1
block_size = 16
learning_rate = 1e-2
min_lr = 0.0
warmup_iters = 2
eval_interval = 2
eval_iters = 1
device = "cpu"
"""
WINDOWS = f"""title = "Windows"
factor = "attention"
margin = 0.5
{HEAD}
[arms]
full = {{ attention = "full" }}
"window:4" = {{ attention = "window:4" }}
[conditions]
"short" = {{ block_size = 16 }}
"long" = {{ block_size = 32, batch_size = 2 }}
[[expect]]
text = "a window of 4 is no worse"
metric = "loss_difference"
arm = "window:4"
at_most = 0.0
"""
RATES = f"""title = "Rates"
factor = "learning_rate"
baseline = "1e-2"
{HEAD.replace("eval_iters = 1", "eval_iters = 1" + chr(10) + "grad_clip = 0.0")}
[arms]
"1e-3" = {{ learning_rate = 1e-3 }}
"1e-2" = {{ learning_rate = 1e-2 }}
"1e30" = {{ learning_rate = 1e30 }}
"""
SIZES = f"""title = "Sizes"
factor = "size"
baseline = "wide"
{HEAD}
[arms]
wide = {{ n_hidden = 16 }}
narrow = {{ n_hidden = 8 }}
"""
LENGTHS = f"""title = "Lengths"
factor = "length"
{HEAD}
[arms]
short = {{ max_iters = 16 }}
long = {{ max_iters = 30 }}
"""


@pytest.fixture(scope="module")
def pool(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small experiments, trained in this process."""
    root = tmp_path_factory.mktemp("report")
    texts = {"04-windows": WINDOWS, "05-sizes": SIZES, "06-lengths": LENGTHS, "07-rates": RATES}
    for name, text in texts.items():
        path = root / f"{name}.toml"
        path.write_text(text)
        experiment = load_experiment(path)
        planned = plan_runs(experiment, dataset, root / "runs")
        for run in planned:
            if run.read_state() == "new":
                outcome = train_here(run.config)
                assert outcome.status == "done" or run.read_state() == "diverged"
        write_record(experiment, dataset, planned, root / "runs")
    return root / "runs"


@pytest.fixture
def runs(pool: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(pool, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def report(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(pool, tmp_path_factory.mktemp("out"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def text_of(folder: Path) -> str:
    return (folder / "EXPERIMENTS.md").read_text()


def test_the_same_runs_give_the_same_bytes(report: Path, runs: Path, tmp_path: Path) -> None:
    again = write_report(runs, tmp_path / "again")
    assert contents(again) == contents(report)
    assert contents(write_report(runs, again)) == contents(report)


def test_the_log_has_the_records_structure(report: Path) -> None:
    text = text_of(report)
    for part in (
        "## Setup",
        "## Experiment 4: Windows",
        "- Date: 20",
        "- Purpose: To test the report.",
        "- Config of the baseline: `--preset nano --dtype float32 --max_iters 16",
        "[Windows](#experiment-04-windows)",
        '<a id="experiment-04-windows"></a>',
        "- Repeat: `storylab experiment run 04-windows.toml`",
        "**Generation sample**",
        "**Key observations**",
        "iter 16:",
        "Saved new best model",
        "Final train loss",
        "## Conclusions",
    ):
        assert part in text, part
    assert "Power" in text and "not measured" in text  # what this machine cannot tell


def test_every_picture_that_the_log_shows_is_there(report: Path) -> None:
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text_of(report))
    assert len(shown) > 15
    for name in shown:
        svg = (report / name).read_text()
        assert svg.startswith("<svg") and "NaN" not in svg and "Infinity" not in svg


def test_tables_have_as_many_cells_as_headings(report: Path) -> None:
    width = 0
    for line in text_of(report).splitlines():
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line))
            assert width in (0, cells), line
            width = cells
        else:
            width = 0


def test_the_difference_in_the_table_is_that_of_the_runs(report: Path, pool: Path) -> None:
    outcome = load_outcome(pool / "experiments/05-sizes.json")
    losses = [{run.seeds: run.loss for run in cell.arm.runs} for cell in outcome.cells]
    wide, narrow = losses
    difference = sum(narrow[seeds] - wide[seeds] for seeds in wide) / len(wide)
    row = next(line for line in text_of(report).splitlines() if line.startswith("| narrow"))
    assert f"{difference:+.4f} (" in row


def test_remarks_survive(runs: Path, tmp_path: Path) -> None:
    out = write_report(runs, tmp_path / "out")
    text = text_of(out)
    hint = "*Write remarks here; they stay when this file is made again.*"
    assert text.count(hint) == 4
    head, _, tail = text.partition(hint)
    (out / "EXPERIMENTS.md").write_text(head + "Odd.\n\n- I **wonder**." + tail)
    write_report(runs, out)
    assert "Odd.\n\n- I **wonder**." in text_of(out)
    assert read_remarks(text_of(out)) == {"04-windows": "Odd.\n\n- I **wonder**."}
    # Without their end they would be lost, so nothing is written.
    kept = text_of(out)
    broken = kept.replace("<!-- end of remarks -->", "", 1)
    (out / "EXPERIMENTS.md").write_text(broken)
    with pytest.raises(UserError, match=r"EXPERIMENTS.md, line \d+: the remarks on 04-windows"):
        write_report(runs, out)
    assert text_of(out) == broken
    (out / "EXPERIMENTS.md").write_text(kept)
    # Also those of an experiment whose record has gone.
    (runs / "experiments/04-windows.json").unlink()
    write_report(runs, out)
    assert "Remarks on 04-windows" in text_of(out) and "I **wonder**" in text_of(out)


def test_the_learning_rate_that_diverged_is_a_result(report: Path) -> None:
    text = text_of(report)
    assert "Diverged at a peak of 1e+30; the highest that trained to its end is 0.01" in text
    row = next(line for line in text.splitlines() if line.startswith("| 1e30"))
    assert "diverged" in row


def test_observations_are_of_the_experiments_factor(pool: Path) -> None:
    told = {
        path.stem: " ".join(observations(load_outcome(path)))
        for path in (pool / "experiments").glob("*.json")
    }
    assert "windows by layer 4, 4; receptive field 7 of 16 positions" in told["04-windows"]
    assert "Hypothesis (window:4 @ long): a window of 4 is no worse - " in told["04-windows"]
    assert "Best trade by the criterion" in told["05-sizes"]
    assert "No other arm is shown to have both" in told["05-sizes"]
    assert "Over 2 common seeds" in told["05-sizes"]
    assert "another doubling is predicted to bring" in told["06-lengths"]
    assert "epochs were seen" in told["06-lengths"]
    assert "The same fit to the first half alone predicted" in told["06-lengths"]
    assert "No closer interval is given: an optimum between the peaks needs 5" in told["07-rates"]
    for text in told.values():
        assert "throughput" in text and "clipped in" in text


def shortened(run: Run, evaluations: int) -> Run:
    """The run as if it had diverged after so many evaluations."""
    kept, seen = [], 0
    for row in run.rows:
        seen += isinstance(row, EvaluationRow)
        if seen > evaluations:
            break
        kept.append(row)
    return dataclasses.replace(run, state="diverged", rows=kept)


def test_a_run_that_diverged_leaves_no_step_in_a_curve(pool: Path) -> None:
    """Every point of a line is a mean over the same runs, and their number can be read."""
    outcome = load_outcome(pool / "experiments/06-lengths.json")
    cells = list(outcome.cells)
    for index, cell in enumerate(cells):
        first, second = cell.arm.runs
        arm = dataclasses.replace(cell.arm, runs=(first, shortened(second, 4)))
        cells[index] = dataclasses.replace(cell, arm=arm)
    changed = dataclasses.replace(outcome, cells=tuple(cells))
    for cell in changed.cells:
        rows = [row for row in curve_rows(changed) if row["arm"] == cell.arm.name]
        losses = [e.val_loss for e in cell.arm.runs[0].evaluations]
        assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-4)
        assert {row["seeds"] for row in rows} == {"1 of 2"}
    assert {row["pairs"] for row in difference_rows(changed)} == {1}
    # While none has finished, the lines end where the shortest run has.
    cells = [
        dataclasses.replace(
            cell,
            arm=dataclasses.replace(
                cell.arm, runs=tuple(shortened(r, 3 + i) for i, r in enumerate(cell.arm.runs))
            ),
        )
        for cell in outcome.cells
    ]
    rows = curve_rows(dataclasses.replace(outcome, cells=tuple(cells)))
    assert {row["seeds"] for row in rows} == {"2 of 2"}
    ends = [len(cell.arm.runs[0].evaluations) for cell in cells]
    assert len(rows) == sum(ends)


def test_the_band_of_final_losses_is_the_margin(pool: Path) -> None:
    for name, margin in (("04-windows", 0.5), ("05-sizes", None)):
        spec = json.dumps(finals(load_outcome(pool / f"experiments/{name}.json")))
        assert ('"margin:Q"' in spec or '"field": "margin"' in spec) == (margin is not None)
        assert "noise" not in spec


def test_spikes_are_found_where_they_are() -> None:
    values = [3.0 - 0.001 * i + 0.01 * (i % 3) for i in range(100)]
    assert spikes(values) == []
    values[40] += 1.0
    assert spikes(values) == [40]


def test_the_choices_behind_an_experiment_are_in_the_log_and_on_the_page(
    runs: Path, tmp_path: Path
) -> None:
    record = json.loads((runs / "experiments/04-windows.json").read_text())
    (cell,) = (c for c in record["cells"] if (c["arm"], c["condition"]) == ("window:4", "long"))
    name = cell["runs"]["1"]
    shutil.copytree(runs / name, runs / f"{name}.old1")
    write_report(runs, tmp_path / "out")
    log = (tmp_path / "out/EXPERIMENTS.md").read_text()
    page = (tmp_path / "out/index.html").read_text()
    # Windows under two conditions, sizes, lengths, and two rates besides the baseline.
    chosen = "Chosen among 6 arms on 2 seeds: the best of as many equal arms would look better by"
    assert log.count(chosen) == 4 and "(4 experiments on this data in this folder)" in log
    again = f"Re-rolled: 1 earlier run set aside, not counted: {name}.old1"
    _, windows, sizes, *_ = re.split(r"^## Experiment", log, flags=re.MULTILINE)
    assert again in windows and again not in sizes
    assert chosen in page and again in page


def test_a_deleted_run_is_told_of(runs: Path, tmp_path: Path) -> None:
    record = json.loads((runs / "experiments/05-sizes.json").read_text())
    gone = record["cells"][1]["runs"]["2"]
    shutil.rmtree(runs / gone)
    text = text_of(write_report(runs, tmp_path / "out"))
    assert f"1 runs are missing, not trained yet or deleted: narrow, seed 2 ({gone})" in text
    assert "| narrow |" in text


@pytest.mark.parametrize(
    "file", ["config.json", "summary.json", "metrics.jsonl", "story_losses.npy"]
)
def test_a_damaged_run_is_told_of(runs: Path, tmp_path: Path, file: str) -> None:
    record = json.loads((runs / "experiments/05-sizes.json").read_text())
    (runs / record["cells"][0]["runs"]["1"] / file).write_text("junk")
    text = text_of(write_report(runs, tmp_path / "out"))
    assert "**Not in the comparison:** wide, seed 1: " in text


def test_a_damaged_record_is_told_of(runs: Path, tmp_path: Path) -> None:
    (runs / "experiments/05-sizes.json").write_text('{"cells": 3}')
    text = text_of(write_report(runs, tmp_path / "out"))
    assert "**Cannot be read:**" in text and "## Experiment 4: Windows" in text


def test_no_experiment_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no experiments yet"):
        write_report(tmp_path, tmp_path / "out")
    assert main(["experiment", "report", "--runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_watch_shows_the_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((runs / "experiments/05-sizes.json").read_text())
    shutil.rmtree(runs / record["cells"][1]["runs"]["2"])
    (runs / record["cells"][0]["runs"]["2"] / SUMMARY).unlink()
    assert main(["watch", "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    assert "05-sizes: Sizes, 2 of 4 runs done" in out
    shutil.rmtree(runs / "experiments")
    assert main(["watch", "--runs", str(runs)]) == 2
    assert "waiting" in out and "stopped" in out and "diverged" in out and "16/16" in out


# The page


def test_the_page_is_one_small_file_that_fetches_nothing(report: Path) -> None:
    page = (report / "index.html").read_text()
    assert len(page) < 3_000_000
    head = page.partition('<script id="data"')[0]
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", head)
    data = page.partition('type="application/json">')[2].partition("</script>")[0]
    assert "<" not in data  # nothing in a run can end the element
    sections = json.loads(data)["sections"]
    assert [section["label"] for section in sections] == [
        "04-windows", "05-sizes", "06-lengths", "07-rates",
    ]  # fmt: skip
    captions = [caption for caption, _ in sections[0]["figures"]]
    assert "Loss by position in the window" in captions
    assert "None | of <b>note</b>." in str(sections[0]["facts"])


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_the_page_works_in_a_browser(browser: Any, report: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints: list[str] = []

    def note(message: Any) -> None:
        # A figure whose only arm is hidden has nothing to scale its axes by.
        if message.type in ("error", "warning") and "Infinite extent" not in message.text:
            complaints.append(message.text)

    page.on("console", note)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url),
    )
    page.goto((report / "index.html").as_uri())
    windows = page.locator("section").first

    def figure(caption: str) -> Any:
        return windows.locator("figure", has_text=caption)

    curves = figure("Validation loss: mean and range")
    curves.scroll_into_view_if_needed()
    lines = curves.locator("svg .mark-line path")
    lines.first.wait_for()
    assert lines.count() == 2
    # A click on an arm hides its curve, another shows it again.
    arm = windows.locator("button.arm", has_text="window:4")
    arm.click()
    page.wait_for_function(
        "n => n.querySelectorAll('.mark-line path').length === 1", arg=curves.element_handle()
    )
    assert arm.get_attribute("aria-pressed") == "false"
    arm.click()
    page.wait_for_function(
        "n => n.querySelectorAll('.mark-line path').length === 2", arg=curves.element_handle()
    )
    # The other condition has other losses; the axis can count tokens.
    before = lines.first.get_attribute("d")
    windows.get_by_label("condition", exact=True).select_option("long")
    page.wait_for_function(
        "([n, d]) => n.querySelector('.mark-line path').getAttribute('d') !== d",
        arg=[curves.element_handle(), before],
    )
    windows.get_by_label("horizontal axis").select_option("tokens")
    curves.locator("svg text", has_text="1,000").first.wait_for(state="attached")
    # The table sorts by a click on a heading.
    table = windows.locator("table").first
    cells = "rows => rows.map(row => row.cells[4].textContent)"
    table.get_by_role("button", name="val loss").click()
    losses = table.locator("tbody tr").evaluate_all(cells)
    assert losses == sorted(losses)
    table.get_by_role("button", name="val loss").click()
    assert table.locator("tbody tr").evaluate_all(cells) == losses[::-1]
    # Two arms' configs, and samples of the prompt that is chosen.
    windows.get_by_label("second arm").select_option(label="full @ long")
    assert "block_size" in windows.locator("table").last.inner_text()
    windows.get_by_label("prompt").select_option(index=1)
    assert windows.locator(".sample").count() == 4
    # Every figure draws, nothing is wider than the screen, and nothing complains.
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator("svg").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []
