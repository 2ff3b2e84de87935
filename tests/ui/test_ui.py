"""The local page: what it shows, what it reads, and whom it answers."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from executors import train_here
from record_folders import Opened, folders, forget_checksums
from samples import SMALL_EXPERIMENT
from storylab.cli import main
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.experiments.plan import plan_runs
from storylab.experiments.recording import write_record
from storylab.experiments.spec import load_experiment
from storylab.record.index import list_runs

pytest.importorskip("starlette", reason="the extra `ui` is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

import uvicorn
from starlette.testclient import TestClient

from storylab.record.folder import FAILURE, RunFolder
from storylab.record.schema import IterationRow
from storylab.ui.app import create_app
from storylab.ui.course import MOST_POINTS, Course
from storylab.ui.library import Library
from storylab.ui.server import open_port

HERE = "http://127.0.0.1"
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment's finished runs, and hostile text wherever users' text can be."""
    root = tmp_path_factory.mktemp("ui")
    text = SMALL_EXPERIMENT.format(seeds="1, 2")
    (root / "rates.toml").write_text(text)
    experiment = load_experiment(root / "rates.toml")
    planned = plan_runs(experiment, dataset, root / "runs")
    write_record(experiment, dataset, planned, root / "runs")
    for run in planned:
        assert train_here(run.config).status == "done"
    for folder in folders(root):
        summary = json.loads((folder / "summary.json").read_text())
        for sample in summary["samples"]:
            sample["prompt"] += HOSTILE
            sample["text"] += HOSTILE
        (folder / "summary.json").write_text(json.dumps(summary))
    forget_checksums(root)
    return root


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def client(runs: Path) -> Iterator[TestClient]:
    with TestClient(create_app(runs), HERE) as client:
        yield client


@pytest.fixture(scope="module")
def opened() -> Opened:
    return Opened()


def paths(runs: Path) -> list[str]:
    run = folders(runs.parent)[0].name
    return [
        "/",
        "/app.js",
        "/app.css",
        "/figures.js",
        "/api/overview",
        f"/api/curves/{run}",
        f"/api/runs/{run}",
        "/experiments/rates",
    ]


def unfinished(run: Path, iterations: int) -> list[bytes]:
    """Make a finished run one that stopped after ``iterations``; returns the other rows."""
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    kinds = [json.loads(line)["kind"] for line in lines]
    rows = [number for number, kind in enumerate(kinds) if kind == "iteration"][iterations]
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:rows]))
    return lines[rows:]


# What it shows


def test_the_list_is_that_of_the_command_line(client: TestClient, runs: Path) -> None:
    answer = client.get("/api/overview").json()
    assert answer["folder"] == str(runs)
    names = ("name", "state", "loss", "speed", "memory", "started")
    shown = [[row[name] for name in names] for row in answer["runs"]]
    assert shown == [[getattr(row, name) for name in names] for row in list_runs(runs)]
    assert {row["arm"] for row in answer["runs"]} == {
        f"{arm}, seed {seed}" for arm in ("low", "high") for seed in (1, 2)
    }
    assert answer["experiments"] == [
        {"name": "rates", "title": "Two rates", "done": 4, "planned": 4, "fault": ""}
    ]


def test_a_run_in_any_condition_is_listed(client: TestClient, runs: Path) -> None:
    first, second, third, fourth = folders(runs.parent)
    unfinished(first, 4)
    (second / "summary.json").write_text("{")
    (third / "summary.json").unlink()
    (third / FAILURE).write_text('{"outcome": "failed", "reason": "why", "started": ""}')
    (fourth / "summary.json").unlink()
    (fourth / FAILURE).write_text("{}")
    (runs / "experiments" / "broken.json").write_text("{")
    answer = client.get("/api/overview").json()
    states = {row["name"]: row for row in answer["runs"]}
    assert states[first.name]["state"] == "stopped" and states[first.name]["iteration"] == 4
    assert states[second.name]["state"] == "damaged"
    assert "summary.json" in states[second.name]["fault"]
    assert states[third.name]["state"] == "failed" and "why" in states[third.name]["fault"]
    assert states[fourth.name]["state"] == "damaged"
    assert "broken.json" in answer["experiments"][0]["fault"]
    assert client.get("/experiments/broken").status_code == 404


def test_a_curve_has_the_rows_of_the_run(client: TestClient, runs: Path) -> None:
    run = folders(runs.parent)[0]
    curve = client.get(f"/api/curves/{run.name}").json()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "iteration"]
    assert curve["losses"] == [row["loss"] for row in trained]
    assert curve["speeds"] == pytest.approx([row["tokens_per_second"] for row in trained])
    evaluated = [row for row in rows if row["kind"] == "evaluation" and row["iteration"]]
    assert curve["validation_losses"] == [row["val_loss"] for row in evaluated]
    assert curve["tokens_per_iteration"] == trained[0]["tokens"]


def test_a_long_curve_is_thinned_to_means(tmp_path: Path, runs: Path) -> None:
    rows = RunFolder(folders(runs.parent)[0]).read_rows()
    course = Course(tmp_path / "none")
    one = next(row for row in rows if isinstance(row, IterationRow))
    course.rows = [structs.replace(one, iteration=i, loss=float(i)) for i in range(10_000)]
    curve = course.curve("long")
    assert len(curve.losses) <= MOST_POINTS and curve.iterations[-1] == 9_999
    step = curve.iterations[0] + 1
    assert curve.losses[0] == pytest.approx((step - 1) / 2)
    assert sum(loss * step for loss in curve.losses[:-1]) + sum(
        range(curve.iterations[-2] + 1, 10_000)
    ) == pytest.approx(sum(range(10_000)))


def test_the_page_of_an_experiment_is_its_report(client: TestClient, runs: Path) -> None:
    answer = client.get("/experiments/rates")
    assert "Two rates" in answer.text and len(answer.content) < 500_000
    before = answer.headers["etag"]
    assert client.get("/experiments/rates", headers={"If-None-Match": before}).status_code == 304
    unfinished(folders(runs.parent)[3], 4)
    assert client.get("/experiments/rates").headers["etag"] != before
    # Its own script is allowed by its hash, and no other inline script is.
    script = answer.text[answer.text.rindex("<script>") + 8 : answer.text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = answer.headers["content-security-policy"]
    assert f"'sha256-{digest}'" in policy and "script-src 'self' 'unsafe-eval' 'sha256" in policy


# What it reads


def test_a_growing_file_is_read_once(runs: Path, opened: Opened) -> None:
    run = folders(runs.parent)[0]
    rest = unfinished(run, 4)
    course = Course(run / "metrics.jsonl")
    course.update()
    assert len(course.rows) == 4
    for line in rest:
        before = len(course.rows), len(course.evaluations)
        kind = json.loads(line)["kind"]
        # A row is taken when it is whole, though it came in two writes.
        for part, whole in ((line[:10], False), (line[10:], True)):
            with open(course.path, "ab") as file:
                file.write(part)
            course.update()
            more = len(course.rows) - before[0], len(course.evaluations) - before[1]
            assert more == (whole and kind == "iteration", whole and kind == "evaluation")
    assert course.rows == [r for r in RunFolder(run).read_rows() if isinstance(r, IterationRow)]
    with opened.under(run) as count:
        course.update()
    assert not count


def test_a_resumed_run_begins_its_course_again(runs: Path) -> None:
    run = folders(runs.parent)[0]
    course = Course(run / "metrics.jsonl")
    course.update()
    whole = len(course.rows)
    lines = course.path.read_bytes().splitlines(keepends=True)
    shorter = run / "new"
    shorter.write_bytes(b"".join(lines[:-1]))
    shorter.replace(course.path)
    course.update()
    assert len(course.rows) == whole - (b'"iteration",' in lines[-1][:25])
    assert course.rows == [r for r in RunFolder(run).read_rows() if isinstance(r, IterationRow)]
    course.path.unlink()
    course.update()
    assert course.last is None


def test_no_file_is_read_twice(runs: Path, opened: Opened) -> None:
    unfinished(folders(runs.parent)[0], 4)
    library = Library(runs)
    library.overview()
    with opened.under(runs) as count:
        library.overview()
    # Of a run that goes on, its two small files say what it is.
    read = {Path(path).name for path in count}
    assert read <= {"config.json", "environment.json"}, count
    with opened.under(runs) as count:
        library.experiment_page("rates", "/figures.js")
        library.experiment_page("rates", "/figures.js")
    assert set(count.values()) == {1}, count


@pytest.mark.slow
def test_looking_changes_nothing(client: TestClient, runs: Path) -> None:
    def state() -> dict[str, tuple[bytes, int]]:
        files = (path for path in runs.rglob("*") if path.is_file())
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    unfinished(folders(runs.parent)[0], 4)
    before = state()
    for path in paths(runs):
        assert client.get(path).status_code == 200, path
    assert state() == before


def test_losses_on_the_test_split_stay_hidden(client: TestClient, runs: Path) -> None:
    """Only the confirmation of an experiment may show them."""
    losses = set()
    for folder in folders(runs.parent):
        path = folder / "summary.json"
        summary = json.loads(path.read_text())
        summary["test"] = dict.fromkeys(summary["validation"], 7)
        summary["test"]["loss"] = 2.718281828459045
        losses.add("2.71828")
        path.write_text(json.dumps(summary))
    for path in paths(runs)[4:7]:
        text = client.get(path).text
        assert not any(loss in text for loss in losses), path


# Whom it answers


def test_a_foreign_name_for_this_machine_is_refused(runs: Path) -> None:
    """A site whose name leads to 127.0.0.1 would otherwise read the page through the browser."""
    app = create_app(runs)
    codes = {"evil.example": 400, "127.0.0.1.evil.example": 400, "localhost:8484": 200}
    for host, code in codes.items():
        client = TestClient(app, HERE)
        assert client.get("/api/overview", headers={"Host": host}).status_code == code


@pytest.mark.slow
def test_nothing_but_reading_is_answered(client: TestClient, runs: Path) -> None:
    for path in paths(runs):
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert client.request(method, path).status_code == 405
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "http" not in policy


@pytest.mark.parametrize(
    "name", ["..%2f..%2fetc", "..%5c..", "experiments", "missing", "%00", "a%0ab"]
)
def test_no_name_leads_out_of_the_folder(client: TestClient, name: str) -> None:
    for kind in ("/api/curves/", "/api/runs/", "/experiments/"):
        answer = client.get(kind + name, follow_redirects=False)
        assert answer.status_code in (307, 404), (kind, name)
        assert "Traceback" not in answer.text


def test_a_taken_port_is_one_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_port(0) as listener:
        port = listener.getsockname()[1]
        assert main(["ui", "--runs", str(runs), "--port", str(port)]) == 2
    assert f"cannot use port {port}" in capsys.readouterr().err
    for bad in ("70000", "-1"):
        assert main(["ui", "--runs", str(runs), "--port", bad]) == 2
    with pytest.raises(UserError):
        open_port(70_000)


def test_a_folder_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--runs", "nowhere"]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


# In a browser


@pytest.fixture
def address(runs: Path) -> Iterator[str]:
    """The address of a real server."""
    listener = open_port(0)
    config = uvicorn.Config(create_app(runs), log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield f"{HERE}:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_a_run_in_progress_grows_on_the_page(
    browser: Any, address: str, runs: Path, width: int, scheme: str
) -> None:
    first, _, second, _ = folders(runs.parent)
    rest = unfinished(first, 3)
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on(
        "request",
        lambda r: None if r.url.startswith((address, "data:")) else complaints.append(r.url),
    )
    page.goto(address)
    rows = page.locator("#runs tbody tr")
    rows.nth(3).wait_for()
    for run in (first, second):
        page.get_by_role("checkbox", name=run.name).check()
    figure = page.locator("figure", has_text="Training loss")
    lines = figure.locator("svg .mark-line path")
    page.wait_for_function(
        "n => n.querySelectorAll('.mark-line path').length === 2", arg=figure.element_handle()
    )
    # Rows that the run adds reach the curve without a click.
    before = lines.first.get_attribute("d")
    with open(first / "metrics.jsonl", "ab") as file:
        file.write(b"".join(rest))
    page.wait_for_function(
        "([n, d]) => [...n.querySelectorAll('.mark-line path')].every(p => p.getAttribute('d') !== d)",
        arg=[figure.element_handle(), before],
    )
    # Hostile stories are text, and the learning rates differ.
    assert HOSTILE in page.locator("#stories").inner_text()
    assert page.locator("#stories img").count() == 0
    assert "learning_rate" in page.locator("#configs").inner_text()
    # The filter, the order, and an address that can be kept.
    page.get_by_label("filter by name or arm").fill("no such run")
    assert rows.count() == 0
    page.get_by_label("filter by name or arm").fill("")
    page.get_by_role("button", name="val loss").click()
    cells = page.locator("#runs tbody td:nth-child(8)").all_inner_texts()
    losses = [float(text) for text in cells if text]
    assert losses == sorted(losses) and losses
    page.reload()
    page.locator("#chosen").wait_for()
    assert page.get_by_role("checkbox", name=second.name).is_checked()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("link", name="rates").click()
    page.locator(".plot svg").first.wait_for()
    assert complaints == []
