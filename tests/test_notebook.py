"""A run in a notebook: its dataframe, the plot that grows while it trains, and the notebook of the docs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from samples import TINY
from storylab.config import TrainConfig
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.record.run import Run, load_run
from storylab.training.train import train

NOTEBOOK = Path(__file__).parents[1] / "docs/notebooks/first-run.ipynb"
# As in the README's test: enough to run every cell.
SHORTER = {
    "ITERATIONS = 300": "ITERATIONS = 6",
    '"bpe:1024"': '"bpe:1024", builtin_stories=2000',
    "max_new_tokens=120": "max_new_tokens=5",
}


def config_of(dataset: Dataset, folder: Path) -> TrainConfig:
    return TrainConfig(
        model=TINY,
        data_dir=dataset.folder,
        out_dir=folder,
        dtype="float32",
        max_iters=4,
        batch_size=4,
        gradient_accumulation_steps=1,
        block_size=16,
        warmup_iters=2,
        eval_interval=2,
        eval_iters=1,
        device="cpu",
    )


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("notebook") / "a"
    train(config_of(dataset, folder))
    return load_run(folder)


def recorded(run: Run, kind: str) -> list[dict[str, Any]]:
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_a_frame_is_the_rows_of_the_file(run: Run) -> None:
    pytest.importorskip("pandas", reason="the extra notebook is not installed")
    frame, rows = run.frame(), recorded(run, "iteration")
    assert frame.index.name == "iteration" and list(frame.index) == list(range(5))
    for name in ("loss", "learning_rate", "tokens", "step_seconds", "clipped"):
        assert frame[name].tolist() == [row[name] for row in rows]
    # No GPU, no power; the column is there and has a number's type.
    assert frame["power_watts"].isna().all() and frame["power_watts"].dtype == "float64"
    evaluations = run.frame("evaluation")
    assert evaluations["val_loss"].tolist() == [
        row["val_loss"] for row in recorded(run, "evaluation")
    ]
    empty = run.frame("quantization")
    assert len(empty) == 0 and "saturation" in empty
    with pytest.raises(UserError, match="unknown kind of row 'test'"):
        run.frame("test")  # type: ignore[arg-type]


def test_without_pandas_one_line_says_how_to_get_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"pip install 'storylab\[notebook\]'"):
        run.frame()


def test_the_plot_draws_the_losses_and_changes_nothing(
    run: Run, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for IPython that keeps the pictures."""
    shown: list[str] = []
    place = SimpleNamespace(update=shown.append)

    def display(picture: str, display_id: bool) -> Any:
        assert display_id and not shown
        shown.append(picture)
        return place

    module = SimpleNamespace(SVG=lambda text: text, display=display)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=module))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    from storylab.notebook import LivePlot

    train(config_of(dataset, tmp_path / "b"), LivePlot(seconds=0.0))
    assert len(shown) >= 2 and shown[0] != shown[-1]
    picture = ElementTree.fromstring(shown[-1])
    texts = {element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert {"b", "training", "validation", "loss (nats a token)"} <= texts
    losses = [
        [row["loss"] for row in recorded(each, "iteration")]
        for each in (run, load_run(tmp_path / "b"))
    ]
    assert losses[0] == losses[1]


def test_the_notebook_is_stripped() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pandas", "ipykernel", "nbclient"):
        pytest.importorskip(name, reason="the extras notebook and docs are not installed")
    import nbclient
    import nbformat

    monkeypatch.setenv(
        "OMP_NUM_THREADS", "1"
    )  # threads that wait for each other are slow on busy cores
    text = NOTEBOOK.read_text(encoding="utf-8")
    for long, short in SHORTER.items():
        assert json.dumps(long)[1:-1] in text
        text = text.replace(json.dumps(long)[1:-1], json.dumps(short)[1:-1])
    notebook = nbformat.reads(text, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/svg+xml", "text/html"} <= kinds
    assert outputs[-1]["data"]["text/plain"] == "True"
    (folder,) = (tmp_path / "runs").iterdir()
    assert load_run(folder).finished
