"""The command line as a user meets it: every mistake one line and exit code 2, never a traceback."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from executors import InProcess
from storylab.cli import main
from storylab.cli.exits import guarded
from storylab.cli.registry import Call, all_verbs, find_verb, listed_verbs, verb_names
from storylab.cli.tables import print_table
from storylab.cli.verbs.train import TrainCommand
from storylab.config import DEFAULT_DATA_DIR, TrainConfig, preset_config
from storylab.data.dataset import Dataset
from storylab.errors import Diverged, Interrupted, StoppedAtOnce, UserError
from storylab.flags import default_for, parse
from storylab.record import checkpoint
from storylab.record.folder import open_run
from storylab.record.run import load_run

if sys.platform != "win32":
    import pty
    import resource

ROOT = Path(__file__).parents[2]
SMALL = """--preset nano --n_layer 1 --n_embd 64 --n_hidden 64 --dtype float32 --max_iters 6
  --batch_size 4 --gradient_accumulation_steps 1 --block_size 16 --eval_interval 3 --eval_iters 1
  --log_interval 1 --warmup_iters 2 --device cpu""".split()


def run(*args: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "storylab", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def parsed(*args: str) -> TrainConfig:
    return parse(TrainCommand, args, "storylab train", TrainCommand(default_for(args))).config


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a wrong command prints."""
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1
    assert err.startswith("storylab: ")
    return err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "--max_iter", "5"], ["--max_iter", "perhaps you meant --max_iters"]),
        (["train", "--preset", "10b"], ["unknown preset '10b'", "113m"]),
        (["train", "--dtype", "fp9"], ["fp9", "--dtype", "bfloat16"]),
        (["train", "--batch_size", "many"], ["--batch_size", "many"]),
        (["train", "--batch_size", "-1"], ["batch_size is -1"]),
        (["train", "--n_embd", "100"], ["n_embd 100", "n_head"]),
        (["train", "--device", "cuda:7", "--data_dir", "x"], ["--device cpu"]),
        (["train", "--data_dir", "nowhere"], ["no prepared data in nowhere", "storylab prepare"]),
        (["train", "--resume"], ["--out_dir"]),
        (["prepare", "--tokenizer", "bert"], ["bert", "bpe:4096"]),
        (
            ["prepare", "--source", "builtin", "--builtin_stories", "9" * 30, "--out", "unmade"],
            ["builtin_stories", "than 100,000,000"],
        ),
        (["prepare", "--train", "missing.txt", "--validation", "b.txt"], ["missing.txt"]),
        (["prepare", "--train", "missing.txt"], ["--validation"]),
        (["resume", "nowhere"], ["nowhere is not a run folder"]),
        (["eval", "nowhere"], ["nowhere is not a run folder"]),
        (["sample", "nowhere", "--temperature", "-1"], ["temperature"]),
        (["info", "--preset", "huge"], ["unknown preset 'huge'"]),
        (["info", "--vocab_size", "-1"], ["vocab_size is -1"]),
        (["train", "--seed", "99999999999999999999"], ["seed"]),
        (["train", "--rope_base", "nan"], ["rope_base"]),
        (["fly"], ["unknown verb 'fly'", "train"]),
        (["resume"], ["RUN is missing: Run folder"]),
        # Other programs' names for a flag.
        (["train", "--lr", "1e-3"], ["perhaps you meant --learning_rate"]),
        (["train", "--wd=0.1"], ["perhaps you meant --weight_decay"]),
        (["train", "--max-steps", "9"], ["perhaps you meant --max_iters"]),
        (["train", "--n_layers", "3"], ["perhaps you meant --n_layer;"]),
        (["sample", "x", "--temp", "1"], ["perhaps you meant --temperature"]),
        # Numbers, also optional ones.
        (["resume", "x", "--max_iters", "1e3"], ["--max_iters must be a whole number, not '1e3'"]),
        (
            ["eval", "x", "--block_size", "64.0"],
            ["--block_size must be a whole number, not '64.0'"],
        ),
        (
            ["experiment", "run", "x", "--seeds", "two"],
            ["--seeds must be a whole number, not 'two'"],
        ),
        (["compare", "a", "b", "--margin", "abc"], ["--margin must be a number, not 'abc'"]),
        (["train", "--data_seed", "1e3"], ["--data_seed must be a whole number, not '1e3'"]),
        (["train", "--max_iters", "1e3"], ["--max_iters must be a whole number, not '1e3'"]),
        (["train", "--learning_rate", "fast"], ["--learning_rate must be a number, not 'fast'"]),
        (["train", "--max_iters", "9" * 5000], ["--max_iters must be a whole number"]),
        (
            ["train", "--max_iters", "9" * 30],
            ["max_iters is 9999", "at most 1,000,000,000,000,000"],
        ),
        (["train", "--batch_size", "9" * 16], ["at most 1,000,000,000,000,000"]),
        (["train", "--batch_size", "9" * 12], ["tokens in an iteration is"]),
        (["train", "--learning_rate", "1e400"], ["learning_rate is inf", "finite"]),
        (["info", "--n_layer", "9" * 8], ["n_layer is 99999999: it must be at most 10,000"]),
        (["info", "--vocab_size", "9" * 30], ["vocab_size is 9999"]),
        (
            ["compare", "a", "b", "--margin", "inf"],
            ["margin is inf: it must be a finite number above 0"],
        ),
        (
            ["compare", "a", "b", "--margin", "nan"],
            ["margin is nan: it must be a finite number above 0"],
        ),
        (["bench", "--seconds", "inf"], ["seconds is inf: it must be a finite number above 0"]),
        (["sample", "x", "--temperature", "inf"], ["temperature is inf"]),
        (["sample", "x", "--samples", "9" * 30], ["samples is 9999", "at most 10,000"]),
        # A message is one line, whatever is in it.
        (["resume", "a\nb"], [r"a\nb is not a run folder"]),
        (["resume", "a\x1b[2J"], [r"a\x1b[2J is not a run folder"]),
        (["resume", "n" * 300], ["cannot read nnn", "File name too long"]),
        (["train", "--data_dir", "n" * 300], ["cannot read nnn", "File name too long"]),
        (["list", "--runs", "n" * 300], ["cannot read nnn", "File name too long"]),
        (["experiment", "run", "n" * 300], ["cannot read nnn", "File name too long"]),
        (["experiment", "new", "n" * 300], ["nnn", "File name too long"]),
        (["experiment", "run", "/dev/null"], ["cannot read /dev/null: it is a device, not a file"]),
        (["experiment", "run", "nowhere.toml"], ["cannot read nowhere.toml: No such file"]),
    ],
)
def test_a_mistake_is_one_line(
    args: list[str], words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, *args)
    for word in words:
        assert word in line


@pytest.mark.parametrize("verb", ["prepare", "train", "resume", "eval", "sample", "info", "doctor"])
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert not stop.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert f"Examples: storylab {verb}" in text


def test_help_shows_the_values_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--preset", "nano", "--help"])
    assert "(default: 288)" in capsys.readouterr().out


def test_legacy_flags_are_taken_either_way() -> None:
    legacy = """--batch_size 8 --gradient-accumulation-steps 2 --block_size 64 --learning-rate 3e-4
      --min_lr 1e-5 --warmup-iters 5 --weight_decay 0.2 --beta1 0.8 --beta2 0.95 --grad-clip 0.5
      --eval_interval 7 --eval-iters 3 --log_interval 2 --device cpu --compile --seed 5
      --data-dir d --out_dir o --preset 10m --n_layer 3 --dtype float32 --max-iters 9""".split()
    config = parsed(*legacy)
    assert (config.batch_size, config.gradient_accumulation_steps, config.block_size) == (8, 2, 64)
    assert (config.learning_rate, config.min_lr, config.warmup_iters) == (3e-4, 1e-5, 5)
    assert (config.weight_decay, config.beta1, config.beta2) == (0.2, 0.8, 0.95)
    assert (config.grad_clip, config.eval_interval, config.eval_iters) == (0.5, 7, 3)
    assert (config.log_interval, config.device, config.compile, config.seed) == (2, "cpu", True, 5)
    assert (str(config.data_dir), str(config.out_dir)) == ("d", "o")
    assert (config.model.n_layer, config.model.n_embd) == (3, 256)
    assert (config.dtype, config.max_iters) == ("float32", 9)


@pytest.mark.parametrize(
    ("args", "value"),
    [
        (["--compile"], True),
        (["--compile=True"], True),
        (["--compile", "true"], True),
        (["--compile=False"], False),
        (["--compile", "False"], False),
        (["--no_compile"], False),
        (["--no-compile"], False),
        ([], None),
    ],
)
def test_switches_as_nanogpt_writes_them(args: list[str], value: bool) -> None:
    assert parsed(*args).compile is value
    of_the_model = [arg.replace("compile", "qk_norm") for arg in args]
    assert parsed(*of_the_model).model.qk_norm is bool(value)
    assert parsed(*args, "--max_iters", "3").max_iters == 3


def test_values_that_look_like_switches_and_repeated_presets() -> None:
    assert str(parsed("--out_dir", "compile").out_dir) == "compile"
    config = parsed("--preset", "nano", "--preset=10m")
    assert config == preset_config("10m")


def test_the_script_without_an_installation_says_how_to_install(tmp_path: Path) -> None:
    script = [sys.executable, "-S", "-I", str(ROOT / "train_tinystories.py")]
    result = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert "make demo" in result.stderr and result.stderr.count("\n") == 1


def test_the_record_command_means_the_record() -> None:
    assert parsed("--dtype", "bfloat16", "--max_iters", "1000") == preset_config("113m")
    assert preset_config("113m") == TrainConfig()


def test_info_prints_the_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--preset", "113m"]) == 0
    assert "112,934,400 parameters" in capsys.readouterr().out
    assert main(["info", "--preset", "10m", "--vocab_size", "50257"]) == 0
    assert "21,916,160 parameters" in capsys.readouterr().out


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0 and main(["--help"]) == 0 and main([]) == 2
    assert "prepare" in capsys.readouterr().out
    assert main(["experiment", "--help"]) == 0
    assert "storylab experiment run|new|confirm|report" in capsys.readouterr().out


def test_every_verb_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = all_verbs()
    assert sorted(verb.name for verb in verbs) == sorted(verb_names())
    # The list reads the facts from the source.
    for fact, verb in zip(listed_verbs(), verbs, strict=True):
        assert dataclasses.asdict(fact) == {
            name: getattr(verb, name) for name in dataclasses.asdict(fact)
        }
    main(["--help"])
    listed = capsys.readouterr().out.partition("examples:")[0]
    for verb in verbs:
        assert re.search(rf"^  {verb.name} .*{re.escape(verb.help)}$", listed, re.MULTILINE)
    assert max(map(len, listed.splitlines())) <= 100


def test_an_unknown_verb_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "trian")
    known = (
        "prepare, train, resume, eval, sample, info, doctor, export, completion, import, publish, sync, "
        "experiment, plan, bench, compare, noise, list, work, watch, ui, verify"
    )
    assert line == f"storylab: unknown verb 'trian': use one of {known}\n"
    assert (
        "there is no 'x': say what to do: storylab experiment run, new, confirm, report"
        in fails(capsys, "experiment", "x")
    )
    assert fails(capsys, "experiment") == (
        "storylab: say what to do: storylab experiment run, new, confirm, report\n"
    )


@pytest.mark.slow
def test_doctor_measures_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--presets", "nano", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "GFLOP/s" in out and "tok/s" in out and "CPU instructions" in out


@pytest.mark.slow
def test_from_stories_to_samples(tmp_path: Path) -> None:
    """The README's way through the verbs, each in its own process, in plain lines when piped."""
    made = run("prepare", "--source", "builtin", "--tokenizer", "bpe:300", cwd=tmp_path,
               FORCE_COLOR="1")  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "19,000 stories" in made.stdout and "fingerprint" in made.stdout
    data = ["--data_dir", "data/builtin-bpe300"]
    trained = run("train", *SMALL, *data, "--out_dir", "runs/a", cwd=tmp_path, FORCE_COLOR="1")
    assert trained.returncode == 0, trained.stderr
    assert "\x1b" not in trained.stdout + trained.stderr and trained.stderr == ""
    assert trained.stdout.startswith("iter 0:    loss ")
    assert "\nSaved new best model (val loss: " in trained.stdout
    assert "; windows of 16 tokens running through the stories in turn\n" in trained.stdout
    log = (tmp_path / "runs/a/log.txt").read_text()
    assert trained.stdout.startswith(log)
    sampled = run("sample", "runs/a", "--prompt", "Tom", "--samples", "2", cwd=tmp_path)
    assert sampled.returncode == 0 and sampled.stdout.count("Tom") >= 2
    evaluated = run("eval", "runs/a", "--checkpoint", "best", cwd=tmp_path)
    assert evaluated.returncode == 0 and "bits per byte" in evaluated.stdout
    other = run("eval", "runs/a", "--block_size", "32", "--aligned", cwd=tmp_path)
    assert "windows of 32 tokens that start again at every story\n" in other.stdout
    extended = run("resume", "runs/a", cwd=tmp_path)
    assert extended.returncode == 0 and "is finished" in extended.stdout
    again = run("train", *SMALL, *data, "--out_dir", "runs/a", cwd=tmp_path)
    assert again.returncode == 2 and "not empty" in again.stderr


@pytest.mark.slow
def test_the_script_is_a_door_to_the_same_code(tmp_path: Path, dataset: Dataset) -> None:
    args = [*SMALL, "--data_dir", str(dataset.folder)]
    script = [sys.executable, str(ROOT / "train_tinystories.py")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*script, *args, "--out_dir", str(tmp_path / "a")], check=True, env=env)
    run("train", *args, "--out_dir", str(tmp_path / "b"))
    runs = [open_run(tmp_path / name) for name in "ab"]
    a, b = (checkpoint.load(r.checkpoint("last"))[0] for r in runs)
    assert checkpoint.weights_sha256(a) == checkpoint.weights_sha256(b)


@pytest.mark.slow
def test_without_network_the_record_command_names_three_ways_on(tmp_path: Path) -> None:
    """The hub's address leads nowhere; nothing else is trained on instead."""
    script = [sys.executable, str(ROOT / "train_tinystories.py"), "--dtype", "bfloat16"]
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run(
        [*script, "--max_iters", "1000"], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    for way in ("--train FILES", "HF_ENDPOINT", "--source builtin"):
        assert way in result.stderr
    assert not (tmp_path / DEFAULT_DATA_DIR).exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("verb", "work"),
    [
        ("train --data_dir {}", "storylab.training.train.train"),
        ("doctor", "storylab.doctor.examine"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_running_out_of_memory_says_what_to_halve(
    dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    work: str,
    error: Exception,
) -> None:
    monkeypatch.setattr(work, Mock(side_effect=error))
    line = fails(capsys, *verb.format(dataset.folder).split())
    assert "--batch_size" in line and "--gradient_accumulation_steps" in line


def test_another_fault_of_torch_is_not_hidden(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storylab.training.train.train", Mock(side_effect=RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        main(["train", "--data_dir", str(dataset.folder)])


def test_compiling_without_a_compiler_is_refused(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    args = ["--data_dir", str(dataset.folder), "--device", "cpu", "--compile"]
    assert "C++ compiler" in fails(capsys, "train", *args)


@pytest.mark.slow
def test_a_terminal_gets_a_bar_under_the_lines(tmp_path: Path, dataset: Dataset) -> None:
    """Under a pseudo-terminal: the record's lines, and a bar with an ETA that leaves no trace."""
    args = [*SMALL, "--data_dir", str(dataset.folder), "--out_dir", str(tmp_path / "a")]
    args += ["--max_iters", "300", "--eval_interval", "100"]
    main_end, command_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "storylab", "train", *args],
        stdout=command_end,
        stderr=command_end,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(command_end)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end has closed
        while piece := os.read(main_end, 65536):
            shown += piece
    assert process.wait() == 0
    text = shown.decode()
    assert "training" in text and "ETA" in text and "/301" in text
    assert "iter 300:  loss " in text


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_a_hint(tmp_path: Path, dataset: Dataset) -> None:
    args = [*SMALL, "--data_dir", str(dataset.folder), "--out_dir", str(tmp_path / "a")]
    args += ["--max_iters", "100000", "--eval_interval", "100000", "--log_interval", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "storylab", "train", *args],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "a" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"storylab resume {tmp_path / 'a'}" in err and err.count("\n") == 1
    saved = open_run(tmp_path / "a")
    _, state = checkpoint.load(saved.checkpoint("last"))
    assert state["next_iteration"] == len(saved.read_rows()) > 0


def limit_file_size(limit: int) -> None:
    """Stands in for a full disk: writes beyond ``limit`` bytes fail as they would there."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [3_000, 60_000])
def test_a_full_disk_loses_nothing(tmp_path: Path, dataset: Dataset, limit: int) -> None:
    args = [*SMALL, "--data_dir", str(dataset.folder), "--out_dir", str(tmp_path / "a")]
    assert run("train", *args).returncode == 0
    before = (tmp_path / "a/checkpoints/last.safetensors").read_bytes()
    commands = [
        ["prepare", "--source", "builtin", "--tokenizer", "bpe:300", "--out", str(tmp_path / "d")],
        ["train", *args[:-1], str(tmp_path / "b")],
        ["train", *args, "--max_iters", "6", "--resume"],
    ]
    (tmp_path / "a" / "summary.json").unlink()  # as if it had not finished
    for command in commands:
        result = subprocess.run(
            [sys.executable, "-m", "storylab", *command],
            capture_output=True,
            text=True,
            preexec_fn=lambda: limit_file_size(limit),
        )
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("\n") == 1 and "cannot write" in result.stderr
    assert not (tmp_path / "d").exists()
    assert (tmp_path / "a/checkpoints/last.safetensors").read_bytes() == before


# What is printed


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few iterations, trained where only ASCII can be printed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    args = [*SMALL, "--data_dir", str(dataset.folder), "--out_dir", str(folder)]
    result = run("train", *args, PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "Run folder: " in result.stdout
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "prompt", "printed"),
    [
        ("ascii", "caf\u00e9 ", b"caf?"),
        ("latin-1", "\u65e5\u672c", b"??"),
        ("utf-8:strict", "caf\udce9", "caf\ufffd".encode()),  # a byte that is no UTF-8
    ],
)
def test_what_a_terminal_cannot_show_is_replaced(
    trained: Path, encoding: str, prompt: str, printed: bytes
) -> None:
    command = [sys.executable, "-m", "storylab", "sample", str(trained), "--prompt", prompt]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding}
    result = subprocess.run([*command, "--max_new_tokens", "3"], capture_output=True, env=env)
    assert result.returncode == 0 and result.stdout.startswith(printed)
    assert b"Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_output_is_no_fault(trained: Path, tmp_path: Path, outputs: str) -> None:
    """Files that are opened later must not get what is printed either."""
    command = [sys.executable, "-m", "storylab", "resume", str(trained)]
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()  # so that it is evaluated and written again
    command[-1] = str(tmp_path / "run")
    result = subprocess.run(f"{shlex.join(command)} {outputs}", shell=True, capture_output=True)
    assert result.returncode == 0 and result.stdout + result.stderr == b""
    again = load_run(tmp_path / "run")
    assert again.finished and again.loss == load_run(trained).loss


@pytest.mark.slow
def test_an_output_that_is_full_is_one_line(trained: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    command = [sys.executable, "-m", "storylab", "list", "--runs", str(trained.parent)]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr == "storylab: cannot write the output: No space left on device\n"


def test_a_title_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("[/b] of [link](x)", ("name",), [("[red]",)])
    out = "".join(capsys.readouterr().out.split())
    assert "[/b]of[link](x)" in out and "[red]" in out


@pytest.mark.parametrize(
    ("verb", "remedy"),
    [("sample", "fewer --samples"), ("eval", "--block_size"), ("list", "machine with more memory")],
)
def test_out_of_memory_names_a_flag_that_the_verb_has(
    capsys: pytest.CaptureFixture[str], verb: str, remedy: str
) -> None:
    failing = dataclasses.replace(find_verb(verb), run=Mock(side_effect=MemoryError))
    assert guarded(lambda: failing(Call(f"storylab {verb}", [], InProcess()))) == 2
    line = capsys.readouterr().err
    assert "out of memory" in line and remedy in line and "--batch_size" not in line


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PermissionError(13, "Permission denied", "a/b"), 2, "cannot use a/b: Permission denied"),
        (UserError("wrong\nflag"), 2, "wrong\\nflag"),
        (Diverged("loss is nan"), 1, "loss is nan"),
        (Interrupted("stopped", signal.SIGTERM), 143, "stopped"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (StoppedAtOnce(signal.SIGTERM), 143, "will be repeated"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
    ],
    ids=repr,
)
def test_every_end_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storylab.cli.exits._discard_output", Mock())  # pytest's own output
        assert guarded(Mock(side_effect=error)) == code
    err = capsys.readouterr().err
    assert err.startswith("storylab: ") and err.endswith(f"{line}\n") and err.count("\n") == 1


# Prompts


def sampled(capsys: pytest.CaptureFixture[str], run: Path, prompt: str) -> tuple[str, str]:
    args = ["sample", str(run), "--prompt", prompt, "--temperature", "0", "--max_new_tokens", "8"]
    assert main([*args, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_a_space_at_the_end_of_a_prompt_changes_nothing(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, err = sampled(capsys, trained, "Once upon a time")
    assert err == "" and told.startswith("Once upon a time")
    for spaces in (" ", "   "):
        again, err = sampled(capsys, trained, "Once upon a time" + spaces)
        assert again == told
        assert err.startswith("storylab: the space at the end") and err.count("\n") == 1


def test_the_start_of_a_story_can_be_asked_for(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, err = sampled(capsys, trained, "")
    assert err == ""
    assert sampled(capsys, trained, "<|endoftext|>") == (start, "")
    assert sampled(capsys, trained, " ")[0] == start
    told, _ = sampled(capsys, trained, "Tom")
    assert sampled(capsys, trained, "<|endoftext|><|endoftext|>Tom") == (told, "")
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    assert "<|endoftext|>" in capsys.readouterr().out


@pytest.mark.parametrize(
    "how",
    ["--temperature 1e-320", "--temperature 5e-324", "--temperature 1e300", "--top_p 1e-320",
     "--top_p 5e-324"],
)  # fmt: skip
def test_any_temperature_works(trained: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    args = ["sample", str(trained), "--max_new_tokens", "4", "--device", "cpu", *how.split()]
    assert main(args) == 0
    assert capsys.readouterr().out.startswith("Once upon a time there was a little")
