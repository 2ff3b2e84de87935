"""A wrong value or byte in any file is named in one line; the rest is reported."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from damage import (
    Place,
    run_command,
)
from storylab.decode import decode
from storylab.errors import UserError
from storylab.experiments.records import read_experiment
from storylab.files import read_json
from storylab.record.run import load_run
from storylab.record.schema import Summary

pytestmark = pytest.mark.slow
# What a value may be replaced with.
ODD_VALUES: list[Any] = [
    *(
        None,
        True,
        "",
        "text",
        "1",
        "\ud800",
        -1,
        0,
        1.5,
        10**30,
        -1e300,
        1e39,
        [],
        [1],
        {},
        {"a": 1},
    ),
    float("nan"),
    float("inf"),
]
ODD_BYTES = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"\x00" * 50, b"NaN", b'"text"', b"1e999",
]  # fmt: skip
# The same ones every time; STORYLAB_EXAMPLES=1000 looks for more.
FEW = settings(
    max_examples=int(os.environ.get("STORYLAB_EXAMPLES", "5")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values within ``value``."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places_in(value[key], (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """``value`` with ``new`` at ``path``; without what is there if ``new`` is the class ``del``."""
    if not path:
        return new
    key, *rest = path
    if isinstance(value, dict):
        if not rest and new is DELETED:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: replaced(value[key], tuple(rest), new)}
    changed = list(value)
    if not rest and new is DELETED:
        del changed[key]
    else:
        changed[key] = replaced(value[key], tuple(rest), new)
    return changed


DELETED = object()


def damage(draw: st.DataObject, path: Path) -> None:
    """Change one value of a JSON file or of a row of metrics, or the file as a whole."""
    if draw.draw(st.integers(0, 4), label="whole") == 0:
        data = path.read_bytes()
        path.write_bytes(draw.draw(st.sampled_from([*ODD_BYTES, data[: len(data) // 2], data * 2])))
        return
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = draw.draw(st.integers(0, len(lines) - 1), label="line")
    value = json.loads(lines[number])
    where = draw.draw(st.sampled_from([p for p in places_in(value) if p]), label="path")
    new = draw.draw(st.sampled_from([DELETED, *ODD_VALUES]), label="value")
    lines[number] = json.dumps(replaced(value, where, new))
    path.write_text("\n".join(lines) + "\n")


JSON_FILES = [
    "low/config.json", "low/data.json", "low/environment.json", "low/summary.json",
    "low/precision.json", "low/metrics.jsonl", "data/manifest.json", "record",
]  # fmt: skip


@pytest.mark.parametrize("file", JSON_FILES)
@given(data=st.data())
@FEW
def test_any_value_may_be_missing_or_another(
    whole: Place, tmp_path: Path, quick: None, capsys: Any, file: str, data: st.DataObject
) -> None:
    place = whole.copy(tmp_path / "place")
    paths = {"record": place.record, "data/manifest.json": place.data / "manifest.json"}
    damage(data, paths.get(file, place.folders[0] / Path(file).name))
    for args in place.verbs() if file == "low/config.json" else place.verbs()[:-1]:
        run_command(capsys, args)


@pytest.mark.parametrize(
    "file",
    ["story_losses.npy", "test_losses.npy", "position_losses.npy", "checkpoints/last.safetensors"],
)
@given(data=st.data())
@FEW
def test_any_byte_may_be_another(
    whole: Place, tmp_path: Path, quick: None, capsys: Any, file: str, data: st.DataObject
) -> None:
    place = whole.copy(tmp_path / "place")
    path = place.folders[0] / file
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(
            st.integers(0, 255)
        )
    path.write_bytes(content)
    for args in place.verbs()[2:-1]:
        run_command(capsys, args)


@given(data=st.data())
@FEW
def test_figures_of_any_rows_can_be_drawn(
    whole: Place, tmp_path: Path, capsys: Any, data: st.DataObject
) -> None:
    place = whole.copy(tmp_path / "place")
    damage(data, place.folders[0] / data.draw(st.sampled_from(["metrics.jsonl", "summary.json"])))
    run_command(capsys, ["experiment", "report", "--runs", str(place.runs)])


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("validation", "loss"), "3.2", "validation.loss: expected `float`, got `str`"),
        (("validation",), None, "validation: is null in a finished run"),
        (("samples", 1, "text"), DELETED, "samples[1].text: is missing"),
        (("samples",), [], "samples: is empty in a finished run"),
        (("iterations",), 5.0, "iterations: expected `int`, got `float`"),
        (("epochs",), DELETED, "epochs: is missing"),
        (("seconds",), -1, "seconds: expected `float` >= 0.0"),
        (("status",), "fine", "status: invalid enum value 'fine'"),
        (("tokens",), 10**30, "tokens: expected `int` <= 9223372036854775807"),
        (("parameters",), True, "parameters: expected `int`, got `bool`"),
    ],
)
def test_the_path_of_what_is_wrong_is_named(
    whole: Place, tmp_path: Path, path: tuple[Any, ...], value: Any, fault: str
) -> None:
    folder = whole.copy(tmp_path / "place").folders[0]
    summary = folder / "summary.json"
    summary.write_text(json.dumps(replaced(json.loads(summary.read_text()), path, value)))
    with pytest.raises(UserError) as caught:
        load_run(folder)
    assert str(caught.value) == f"{summary} is damaged: {fault}"


@pytest.mark.parametrize(
    ("line", "key", "value", "fault"),
    [
        (2, "loss", DELETED, "line 2 is damaged: loss: is missing"),
        (2, "step_seconds", 0, "line 2 is damaged: step_seconds: expected `float` > 0.0"),
        (1, "kind", "other", "line 1 is damaged: kind: invalid value 'other'"),
        (
            1,
            "grad_norm",
            float("nan"),
            "line 1 is not valid JSON (JSON is malformed: invalid character",
        ),
    ],
)
def test_the_row_that_is_wrong_is_named(
    whole: Place, tmp_path: Path, line: int, key: str, value: Any, fault: str
) -> None:
    folder = whole.copy(tmp_path / "place").folders[0]
    path = folder / "metrics.jsonl"
    kinds = [row for row in path.read_text().splitlines() if '"quantization"' not in row]
    kinds[line - 1] = json.dumps(replaced(json.loads(kinds[line - 1]), (key,), value))
    path.write_text("\n".join(kinds) + "\n")
    with pytest.raises(UserError) as caught:
        load_run(folder)
    assert f"{path} {fault}" in str(caught.value)


def test_rows_out_of_order_are_damage(whole: Place, tmp_path: Path) -> None:
    folder = whole.copy(tmp_path / "place").folders[0]
    path = folder / "metrics.jsonl"
    rows = path.read_text()
    path.write_text(
        rows.replace('"kind": "iteration", "iteration": 3', '"kind": "iteration", "iteration": 2')
    )
    with pytest.raises(UserError, match="iteration 2 where 3 should be"):
        load_run(folder)
    # A last line that a kill has truncated is no damage; the same in the middle is.
    path.write_text(rows + '{"kind": "iter')
    assert load_run(folder).finished
    path.write_text('{"kind": "iter\n' + rows)
    with pytest.raises(UserError, match=r"metrics\.jsonl line 1"):
        load_run(folder)


def test_tables_that_do_not_fit_are_damage(whole: Place, tmp_path: Path) -> None:
    folder = whole.copy(tmp_path / "place").folders[0]
    path = folder / "position_losses.npy"
    table = np.load(path)
    for odd in (table[:-1], table[None], table.astype(np.float32), table * np.nan):
        np.save(path, odd)
        with pytest.raises(UserError, match="position_losses"):
            load_run(folder)
    with open(path, "wb") as file:  # a header that asks for more than there is memory
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**15,)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(UserError, match="position_losses"):
        load_run(folder)
    path.unlink()
    with pytest.raises(UserError, match="position_losses"):
        load_run(folder)


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("cells", 0, "runs", "1"), "../../elsewhere", "is no name of a run folder"),
        (("cells", 0, "arm"), "other", "is not of its arms and conditions"),
        (("cells",), [], "no cells"),
        (("baseline",), "other", "there is no baseline 'other'"),
        (("margin",), -1, "margin: expected `float` > 0.0"),
        (("factor",), "nonsense", "there is no factor 'nonsense'"),
        (("cells", 0, "config", "batch_size"), "4", "batch_size: expected `int`, got `str`"),
        (("cells", 1, "config", "model", "n_embd"), DELETED, "model.n_embd"),
    ],
)
def test_a_damaged_record_says_where(
    whole: Place,
    tmp_path: Path,
    quick: None,
    capsys: pytest.CaptureFixture[str],
    path: tuple[Any, ...],
    value: Any,
    fault: str,
) -> None:
    place = whole.copy(tmp_path / "place")
    record = replaced(json.loads(place.record.read_text()), path, value)
    place.record.write_text(json.dumps(record))
    code, text = run_command(capsys, ["experiment", "report", "--runs", str(place.runs)])
    assert code == 0 and "rates.json is damaged" in text and fault in text


def test_a_swapped_optimizer_is_refused(
    whole: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint holds AdamW's state, the altered config asks for Muon."""
    place = whole.copy(tmp_path / "place")
    run = place.folders[0]
    (run / "summary.json").unlink()
    config = json.loads((run / "config.json").read_text()) | {"optimizer": "muon"}
    (run / "config.json").write_text(json.dumps(config))
    code, text = run_command(capsys, ["resume", str(run), "--data_dir", str(place.data)])
    assert code == 2 and "optimizer" in text and "altered" in text


def test_json_that_python_alone_understands_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("[" * 100_000, "NaN", "[Infinity]", "1" * 5000, "\ufeff{}"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
            read_json(path)


def test_a_summary_may_have_more_but_not_less(whole: Place) -> None:
    with pytest.raises(UserError, match=r"here is damaged: status: is missing"):
        decode(Summary, b"{}", "here")
    with pytest.raises(UserError, match=r"here is damaged: expected `object`, got `array`"):
        decode(Summary, b"[1]", "here")
    later = json.loads((whole.folders[0] / "summary.json").read_text()) | {"later": [None]}
    assert decode(Summary, json.dumps(later).encode(), "here").status == "finished"


def test_nothing_of_a_whole_record_is_refused(whole: Place) -> None:
    assert read_experiment(whole.record).seeds == [1, 2]
    for folder in whole.folders:
        result = load_run(folder)
        assert result.finished and result.quantization and len(result.position_losses) == 16
