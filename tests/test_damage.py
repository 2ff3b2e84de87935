"""Whatever is wrong with a file of a record, it is named in one line and everything else is reported."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import SMALL_EXPERIMENT
from executors import InProcess, perform_quietly, train_here
from storylab.cli import main
from storylab.data.dataset import Dataset
from storylab.decode import convert, decode
from storylab.errors import UserError
from storylab.execution.job import Job, Outcome
from storylab.experiments.outcome import read_experiment
from storylab.experiments.plan import plan_runs
from storylab.experiments.recording import write_record
from storylab.experiments.spec import load_experiment
from storylab.files import atomic_path, exists, held, open_file, read_json
from storylab.record.folder import RunFolder, open_run
from storylab.record.run import load_run
from storylab.record.schema import DataInfo, Summary
from storylab.reporting import report as reporting

pytestmark = pytest.mark.slow
FILES = [
    *("config.json", "data.json", "environment.json", "summary.json", "precision.json"),
    *("metrics.jsonl", "story_losses.npy", "position_losses.npy", "test_losses.npy"),
    "tokenizer.tiktoken",
    *("checkpoints/last.safetensors", "log.txt"),
]
# Those that every comparison and report reads; the others are for going on and for sampling.
RECORD = FILES[:9]
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


class Place:
    """An experiment with its runs and data, to damage."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file, self.runs, self.data = root / "rates.toml", root / "runs", root / "data"
        self.record = self.runs / "experiments" / "rates.json"

    @property
    def folders(self) -> list[Path]:
        """The runs: low and high of seed 1, low and high of seed 2."""
        cells = json.loads((self.root / "rates.json").read_text())["cells"]
        return [self.runs / cell["runs"][seed] for seed in "12" for cell in cells]

    def copy(self, to: Path) -> Place:
        if to.exists():
            shutil.rmtree(to)
        shutil.copytree(self.root, to)
        return Place(to)

    def verbs(self) -> list[list[str]]:
        """Every verb that reads a record, on the first run where it takes one."""
        run, *others = map(str, self.folders)
        data = ["--data_dir", str(self.data)]
        runs = ["--runs", str(self.runs)]
        return [
            ["list", *runs],
            ["watch", *runs],
            ["compare", *others, run],
            ["compare", run, *others],
            ["noise", run],
            ["noise", others[1]],
            ["sample", run, "--max_new_tokens", "3", "--device", "cpu"],
            ["eval", run, "--device", "cpu", *data],
            ["experiment", "report", *runs],
            ["resume", run, *data],
            ["experiment", "run", str(self.file), *runs, *data],
        ]


@pytest.fixture(scope="module")
def whole(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The place before any damage, trained in this process."""
    place = Place(tmp_path_factory.mktemp("whole") / "place")
    shutil.copytree(dataset.folder, place.data)
    place.file.write_text(SMALL_EXPERIMENT.format(seeds="1, 2"))
    experiment = load_experiment(place.file)
    planned = plan_runs(experiment, dataset, place.runs)
    for run in planned:
        assert train_here(run.config).status == "done"
    shutil.copy(write_record(experiment, dataset, planned, place.runs), place.root)
    return place


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """No figures: they are tested elsewhere."""
    patch = pytest.MonkeyPatch()
    patch.setattr(reporting, "_figures", lambda outcome: ())
    yield
    patch.undo()


@contextlib.contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Fail where something waits for ever; far more time than the block needs."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def only_train(job: Job) -> Outcome:
    """Training in this process, and no calibrations."""
    return perform_quietly(job) if job.action == "train" else Outcome("done")


def told(capsys: pytest.CaptureFixture[str], args: list[str]) -> tuple[int, str]:
    """Exit code and everything printed; standard error has at most one line that is the program's own."""
    with no_longer_than(900):
        code = main(args, InProcess(only_train))
    out, err = capsys.readouterr()
    assert code in (0, 1, 2), args
    assert err.count("storylab: ") <= 1 and "Traceback" not in out + err
    assert code != 2 or err.startswith("storylab: ")
    if args[:2] == ["experiment", "report"] and code == 0:
        out += (Path(args[3]) / "report" / "EXPERIMENTS.md").read_text()
    return code, out + err


def test_what_is_whole_is_read_by_every_verb(
    whole: Place, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for args in whole.copy(tmp_path / "place").verbs():
        code, text = told(capsys, args)
        assert code == 0 and "damaged" not in text, args


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def make_folder(path: Path) -> None:
    path.mkdir()


def make_nonsense(path: Path) -> None:
    path.write_bytes(b"\xff{[")


KINDS = [make_fifo, make_loop, make_dangling, make_folder, make_nonsense]


@pytest.mark.parametrize(
    ("file", "make"),
    [
        *((file, make_fifo) for file in FILES),
        *((file, make) for file in ("summary.json", "metrics.jsonl") for make in KINDS[1:]),
        *(("checkpoints/last.safetensors", make) for make in KINDS[1:]),
    ],
)
def test_a_file_that_is_none_is_named(
    whole: Place,
    tmp_path: Path,
    quick: None,
    capsys: pytest.CaptureFixture[str],
    file: str,
    make: Callable[[Path], None],
) -> None:
    place = whole.copy(tmp_path / "place")
    path = place.folders[0] / file
    path.unlink()
    make(path)
    for args in place.verbs():
        _, text = told(capsys, args)
        if args[0] == "list" and (file, make) == ("metrics.jsonl", make_nonsense):
            continue  # of a run that has ended it reads the summary alone, and looks for the rest
        if file in RECORD and args[0] not in ("sample", "eval", "resume"):
            assert place.folders[0].name in text and file in text, args
            if args[:2] == ["experiment", "report"]:
                assert "Not in the comparison:** low, seed 1:" in text
                assert place.folders[1].name not in text  # the others are well
                assert "| high |" in text
        if args[0] == "compare" and args[1] != str(place.folders[0]):
            assert "vs" in text  # those that are left are compared


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("file", ["manifest.json", "train-00000.bin", "validation.stories.npy"])
def test_a_file_of_the_data_that_is_none_is_named(
    whole: Place,
    tmp_path: Path,
    quick: None,
    capsys: pytest.CaptureFixture[str],
    file: str,
    make: Callable[[Path], None],
) -> None:
    place = whole.copy(tmp_path / "place")
    path = place.data / file
    path.unlink()
    make(path)
    for args in place.verbs():
        if "--data_dir" in args:
            code, text = told(capsys, args)
            assert code == 2 and f"{place.data.name}/{file}" in text


@pytest.mark.parametrize("make", KINDS)
def test_a_record_or_log_that_is_none_is_named(
    whole: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    quick: None,
    make: Callable[[Path], None],
) -> None:
    place = whole.copy(tmp_path / "place")
    runs = ["--runs", str(place.runs)]
    make(place.runs / "experiments" / "other.json")
    code, text = told(capsys, ["experiment", "report", *runs])
    assert code == 0 and "other.json" in text and "## Experiment: Two rates" in text
    code, text = told(capsys, ["watch", *runs])
    assert code == 0 and "other.json" in text and "4 of 4 runs done" in text
    log = place.runs / "report" / "EXPERIMENTS.md"
    log.unlink()
    make(log)
    code, text = told(capsys, ["experiment", "report", *runs])
    assert code == 2 and "EXPERIMENTS.md" in text  # what may hold remarks is not written over


# Values


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
        told(capsys, args)


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
        told(capsys, args)


@given(data=st.data())
@FEW
def test_figures_of_any_rows_can_be_drawn(
    whole: Place, tmp_path: Path, capsys: Any, data: st.DataObject
) -> None:
    place = whole.copy(tmp_path / "place")
    damage(data, place.folders[0] / data.draw(st.sampled_from(["metrics.jsonl", "summary.json"])))
    told(capsys, ["experiment", "report", "--runs", str(place.runs)])


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
    # A last line that a kill has cut short is no damage; the same in the middle is.
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
    code, text = told(capsys, ["experiment", "report", "--runs", str(place.runs)])
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
    code, text = told(capsys, ["resume", str(run), "--data_dir", str(place.data)])
    assert code == 2 and "optimizer" in text and "altered" in text


# Faults of the file system


@pytest.mark.parametrize("number", [13, 5, 40, 36])  # EACCES, EIO, ELOOP, ENAMETOOLONG
def test_what_the_system_refuses_is_named(
    whole: Place,
    tmp_path: Path,
    quick: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """The system refuses every look at one run's folder; root, whom it refuses nothing, runs this too."""
    place = whole.copy(tmp_path / "place")
    closed = str(place.folders[0])

    def refusing(name: str) -> None:
        real = getattr(os, name)

        def call(path: Any, *args: Any, **options: Any) -> Any:
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(closed + "/"):
                raise OSError(number, os.strerror(number), os.fspath(path))
            return real(path, *args, **options)

        monkeypatch.setattr(os, name, call)

    for name in ("open", "stat", "lstat", "scandir", "listdir", "unlink"):
        refusing(name)
    for args in place.verbs():
        code, text = told(capsys, args)
        if args[:2] == ["experiment", "run"]:
            continue
        assert closed in text or place.folders[0].name in text, args
        assert os.strerror(number) in text, args
        if args == ["list", "--runs", str(place.runs)]:
            assert code == 0 and place.folders[1].name in text


def test_reading_names_what_it_cannot_read(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path, "it is a folder, not a file"),
        (Path("/dev/null"), "it is a device, not a file"),
        (tmp_path / "none", "No such file"),
        (tmp_path / "none" / "below", "No such file"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=words) as caught, open_file(path):
            pass
        assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="too long"):
        exists(tmp_path / ("n" * 300))
    assert not exists(tmp_path / "none" / "below")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")
    with (
        pytest.raises(UserError, match=r"cannot write .*a\.json: No space left"),
        atomic_path(path),
    ):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    os.mkfifo(tmp_path / ".a.json.tmp")  # would hold whoever opens it to write
    with no_longer_than(900), atomic_path(path) as temporary:
        temporary.write_text("after")
    assert path.read_text() == "after"


def test_a_folder_that_cannot_be_opened_is_not_taken_for_one_at_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        held(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        held(tmp_path / "file")


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


def test_names_of_files_that_are_not_unicode_do_not_hide_the_rest(whole: Place) -> None:
    data = json.loads((whole.folders[0] / "data.json").read_text())
    odd = json.dumps(data | {"request": {"train": ["caf\udce9.txt"]}}).encode()
    assert decode(DataInfo, odd, "here").request == {"train": ["caf?.txt"]}
    odd = json.dumps(data | {"request": "\ud800", "dtype": 1}).encode()
    with pytest.raises(UserError, match="dtype: expected `str`, got `int`"):
        decode(DataInfo, odd, "here")
    with pytest.raises(UserError, match="fingerprint: is missing"):
        convert(DataInfo, {}, "here")


def test_a_run_is_a_folder_of_this_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        open_run(tmp_path)
    with pytest.raises(UserError, match=r"summary\.json"):
        (tmp_path / "summary.json").mkdir()
        RunFolder(tmp_path).read_summary()


def test_nothing_of_a_whole_record_is_refused(whole: Place) -> None:
    assert read_experiment(whole.record).seeds == [1, 2]
    for folder in whole.folders:
        result = load_run(folder)
        assert result.finished and result.quantization and len(result.position_losses) == 16
