"""An export from the command line: whole, checked, replaced only if it is ours, and verified anywhere."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from storylab.checksums import sha256_file
from storylab.cli import main
from storylab.record.run import Run

pytest.importorskip("transformers", reason="the hf extra is not installed")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "small"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["export", str(run.folder), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """A copy to change; it has no run folder near it."""
    shutil.copytree(exported, tmp_path / "copy")
    return tmp_path / "copy"


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error of a command that exits with 2."""
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_an_export_is_verified_elsewhere(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--verify", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "files have the hashes" in out and "greedy tokens equal" in out
    (copy / "README.md").write_text("edited")
    (copy / ".gitattributes").write_text("from a hub")
    assert main(["export", "--verify", str(copy)]) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_verify_finds_an_altered_byte(
    copy: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((copy / name).read_bytes())
    data[-20] ^= 1
    (copy / name).write_bytes(data)
    assert f"{name} has been altered" in fails(["export", "--verify", str(copy)], capsys)


def test_verify_finds_a_config_that_means_another_model(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its hashes fit, but the program computes something else."""
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 20000.0
    (copy / "config.json").write_text(json.dumps(config))
    record = json.loads((copy / "storylab_export.json").read_text())
    record["files"]["config.json"] = sha256_file(copy / "config.json")
    (copy / "storylab_export.json").write_text(json.dumps(record))
    assert "differs from our model" in fails(["export", "--verify", str(copy)], capsys)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"format": "onnx"}, "onnx is not one of this version"),
        ({"weights": "f64"}, "f64 is no type of weights"),
        ({"files": {"../x": ""}}, "is not the name of a file here"),
        ({"prompts": 3}, "prompts"),
    ],
)
def test_verify_refuses_a_damaged_record(
    copy: Path, change: dict[str, object], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "storylab_export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert fault in fails(["export", "--verify", str(copy)], capsys)


def test_an_export_is_replaced_and_nothing_else_is(
    run: Run, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(run.folder), "--checkpoint", "best", "--out", str(copy)]
    assert main(command) == 0
    assert json.loads((copy / "storylab_export.json").read_text())["checkpoint"] == "best"
    assert sorted(path.name for path in copy.parent.iterdir()) == ["copy"]
    capsys.readouterr()
    card = (copy / "README.md").read_bytes()
    (copy / "README.md").write_bytes(card + b"mine\n")
    assert "README.md has been changed since its export" in fails(command, capsys)
    (copy / "README.md").write_bytes(card)
    (copy / "notes.txt").write_text("mine")
    assert "notes.txt, which no export wrote" in fails(command, capsys)
    assert (copy / "notes.txt").read_text() == "mine"


def test_other_folders_are_not_touched(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["export", str(run.folder), "--out"]
    (tmp_path / "a").write_text("mine")
    assert "is a file" in fails([*command, str(tmp_path / "a")], capsys)
    before = sorted(path.name for path in run.folder.iterdir())
    assert "is not an export" in fails([*command, str(run.folder)], capsys)
    assert sorted(path.name for path in run.folder.iterdir()) == before
    monkeypatch.chdir(tmp_path)
    assert "a folder for itself" in fails([*command, "."], capsys)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ([], "name a run folder"),
        (["RUN"], "--out"),
        (["RUN", "--verify", "x"], "give it alone"),
        (["RUN", "--out", "x", "--weights", "q8_0"], "no weights of type q8_0: use f32"),
        (["nowhere", "--out", "x"], "is not a run folder"),
        (["--verify", "nowhere"], "is not an export"),
    ],
)
def test_bad_flags_are_one_line(
    run: Run, words: list[str], fault: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = [str(run.folder) if word == "RUN" else word for word in words]
    assert fault in fails(["export", *words], capsys)
    assert not list(tmp_path.iterdir())


def test_without_the_program_the_export_says_so(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors are read back all the same; verify needs the program."""
    pytest.importorskip("gguf")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr("storylab.export.folder.installed", lambda module: False)
    command = ["export", str(run.folder), "--format", "gguf", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "equal to the rounded weights" in out and "not run in llama_cpp" in out
    assert "llama_cpp is not installed" in fails(
        ["export", "--verify", str(tmp_path / "out")], capsys
    )


def test_a_missing_package_is_named(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    command = ["export", str(run.folder), "--format", "gguf", "--out", str(tmp_path / "out")]
    assert "pip install 'storylab[gguf]'" in fails(command, capsys)
    assert not list(tmp_path.iterdir())


def test_verify_runs_no_code_and_reads_no_pickle(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    (copy / "code.py").write_text("open('ran', 'w')")
    (copy / "config.json").write_text(json.dumps(config))
    record = json.loads((copy / "storylab_export.json").read_text())
    record["files"]["config.json"] = sha256_file(copy / "config.json")
    (copy / "storylab_export.json").write_text(json.dumps(record))
    assert "does not open" in fails(["export", "--verify", str(copy)], capsys)
    assert not (copy / "ran").exists()
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "llama", "auto_map": {}}))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    record["files"] = {}
    (copy / "storylab_export.json").write_text(json.dumps(record))
    assert "does not open" in fails(["export", "--verify", str(copy)], capsys)
