"""--json: one strict document on standard output, of the type that the guide describes.

`python tests/cli/test_json.py` brings the tables of docs/guide/json.md up to date, and adds new fields to
json_fields.txt, where no line is ever changed or removed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import numpy as np
import psutil
import pytest
import torch

from samples import SMALL_EXPERIMENT, TINY
from storylab.cli import main
from storylab.cli.documents import print_document
from storylab.cli.registry import all_verbs
from storylab.config import TrainConfig
from storylab.data.dataset import Dataset
from storylab.doctor import fastest
from storylab.documents import DOCUMENTS
from storylab.documents.doctor import ProductSpeed
from storylab.documents.fields import about, describe
from storylab.documents.list import ListDocument
from storylab.documents.noise import NoiseDocument
from storylab.flags import default_for
from storylab.planning.gpus import GPUS
from storylab.planning.roofline import tokens_per_second
from storylab.planning.software import LIMIT, SOFTWARE
from storylab.precision.recipes import PRODUCTS, RECIPES
from storylab.record.run import load_run
from storylab.training.evaluation import Evaluation
from storylab.training.precision import ComputePolicy
from storylab.training.train import train

PAGE = Path(__file__).parents[2] / "docs/guide/json.md"
FIELDS = Path(__file__).with_name("json_fields.txt")


@pytest.fixture(scope="module")
def runs(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one recipe with two seeds: a-s1 and a-s2."""
    root = tmp_path_factory.mktemp("json") / "runs"
    for seed in (1, 2):
        train(
            TrainConfig(
                model=TINY,
                data_dir=dataset.folder,
                out_dir=root / f"a-s{seed}",
                dtype="float32",
                max_iters=4,
                batch_size=4,
                gradient_accumulation_steps=2,
                block_size=16,
                learning_rate=1e-2,
                warmup_iters=2,
                eval_interval=4,
                eval_iters=1,
                seed=seed,
                device="cpu",
            )
        )
    return root


def refuse(word: str) -> NoReturn:
    raise AssertionError(f"{word} is not JSON")


def document(capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    """The document that a verb prints with --json, decoded into its type after strict checks."""
    assert main([*map(str, args), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and out.endswith("}\n")
    plain = json.loads(out, parse_constant=refuse)
    kind = DOCUMENTS[str(args[0])]
    decoded = msgspec.json.decode(out, type=kind)
    # Strict in both directions: no field is missing, none is unknown, none has another type.
    assert json.loads(msgspec.json.encode(decoded)) == plain
    assert plain["schema"] == f"storylab.{args[0]}/1"
    return decoded


def help_of(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    with contextlib.suppress(SystemExit):
        main([*verb.split(), "--help"])
    return capsys.readouterr().out


def test_the_verbs_with_the_flag_are_those_with_a_document(
    capsys: pytest.CaptureFixture[str],
) -> None:
    having = {verb.name for verb in all_verbs() if "--json" in help_of(verb.name, capsys)}
    assert having == DOCUMENTS.keys()


def test_verify_names_each_difference_with_its_file(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, "verify", runs / "a-s1", "--depth", "record")
    assert found.depth == "record" and found.differences == 0
    assert [(item.path, item.kind) for item in found.verified] == [(str(runs / "a-s1"), "run")]
    shutil.copytree(runs / "a-s1", tmp_path / "run")
    (tmp_path / "run/log.txt").write_text("")
    assert main(["verify", str(tmp_path / "run"), "--depth", "record", "--json"]) == 1
    other = msgspec.json.decode(capsys.readouterr().out, type=DOCUMENTS["verify"])
    (difference,) = other.verified[0].differences
    assert (difference.check, difference.file) == ("bytes", "log.txt")


def test_list_is_what_the_summaries_say(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "runs/a-s2/summary.json").write_text("{")
    shutil.copytree(runs / "a-s1", tmp_path / "runs/b")
    (tmp_path / "runs/b/summary.json").unlink()
    found = document(capsys, "list", "--runs", tmp_path / "runs", "--sort", "name")
    assert found.folder == str(tmp_path / "runs")
    finished, damaged, unfinished = found.runs
    summary = json.loads((runs / "a-s1/summary.json").read_text())
    assert (finished.name, finished.state, finished.fault) == ("a-s1", "finished", None)
    assert finished.validation_loss_nats_per_token == summary["validation"]["loss"]
    assert finished.tokens == summary["tokens"] == 5 * 8 * 16
    assert finished.parameters == summary["parameters"]
    assert finished.tokens_per_second == summary["median_tokens_per_second"]
    assert finished.peak_memory_bytes == summary["peak_memory_bytes"]
    assert finished.started == summary["started"]
    assert damaged.state == "damaged" and "summary.json" in damaged.fault
    assert damaged.started is None and damaged.tokens is None
    assert (unfinished.name, unfinished.state) == ("b", "unfinished")
    (tmp_path / "none").mkdir()
    assert document(capsys, "list", "--runs", tmp_path / "none").runs == []


@pytest.mark.posix
def test_a_name_that_is_not_unicode_has_question_marks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        folder = tmp_path / os.fsdecode(b"\xff\xc3\xa9")
        folder.mkdir()
        (folder / "config.json").touch()
    except OSError:
        pytest.skip("this file system takes Unicode names alone")
    (run,) = document(capsys, "list", "--runs", tmp_path).runs
    assert run.name == "?\N{LATIN SMALL LETTER E WITH ACUTE}"


def test_eval_is_the_summary_of_the_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs / "a-s1"
    found = document(capsys, "eval", folder, "--device", "cpu")
    expected = json.loads((folder / "summary.json").read_text())["validation"]
    assert found.loss_nats_per_token == pytest.approx(expected["loss"], rel=1e-6)
    assert found.standard_error_nats_per_token == pytest.approx(expected["standard_error"], 1e-4)
    assert found.perplexity == pytest.approx(math.exp(expected["loss"]), rel=1e-6)
    assert (found.stories, found.tokens) == (expected["stories"], expected["tokens"])
    bits = found.loss_nats_per_token / math.log(2) * found.tokens / found.text_bytes
    assert found.bits_per_byte == pytest.approx(bits)
    assert (found.split, found.checkpoint, found.aligned) == ("validation", "last", False)
    assert (found.run, found.block_size) == (str(folder), 16)
    assert document(capsys, "eval", folder, "--block_size", 8, "--aligned").aligned


def test_numbers_that_are_not_finite_are_null(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One story has no standard error."""
    one = Evaluation(np.array([np.inf]), np.array([3]), np.zeros(16), 10)
    monkeypatch.setattr("storylab.training.evaluation.evaluate_split", lambda *args: one)
    found = document(capsys, "eval", runs / "a-s1")
    assert found.loss_nats_per_token is found.standard_error_nats_per_token is None
    assert found.perplexity == math.exp(700) and found.stories == 1


def test_info_counts_as_the_text_does(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["info", "--preset", "10m", "--attention", "window:64*2,full", "--n_layer", "3"]
    found = document(capsys, *flags)
    assert main(flags) == 0
    text = capsys.readouterr().out
    assert f"{found.parameters:,} parameters" in text and found.vocab_size == 4096
    assert found.reach_tokens == [64, 64, None] and found.receptive_field_tokens is None
    assert found.model["n_layer"] == 3 and found.model["qk_norm"] is False
    assert found.head_size * found.model["n_head"] == found.model["n_embd"]
    windows = document(capsys, "info", "--attention", "window:64", "--n_layer", 2)
    assert windows.receptive_field_tokens == 127


def test_plan_has_the_numbers_of_the_roofline(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "--preset", "113m", "--gpu", "rtx5090", "a100", "--dtype", "bfloat16"]
    found = document(capsys, *flags)
    assert main(flags) == 0
    text = capsys.readouterr().out
    config = default_for(flags)
    assert found.run.tokens == config.total_tokens and found.experiment is None
    assert found.run.flops == found.run.flops_per_token * found.run.tokens
    assert [gpu.gpu for gpu in found.gpus] == ["rtx5090", "a100"]
    for gpu in found.gpus:
        card = GPUS[gpu.gpu]
        assert gpu.memory_bytes == card.memory * 1e9 and gpu.arms is None
        assert [kind.software for kind in gpu.run.software] == [*SOFTWARE, "limit"]
        for kind in gpu.run.software:
            software = SOFTWARE.get(kind.software, LIMIT)
            speed = tokens_per_second(config, 50257, card, software)
            assert kind.tokens_per_second == pytest.approx(speed)
            assert f"{speed:,.0f}" in text
            busy = sum(part.seconds for part in kind.parts)
            assert busy + kind.waiting_seconds == pytest.approx(kind.micro_batch_seconds)
            if gpu.gpu == "rtx5090" and kind.software != "limit":
                slowest, fastest = kind.slowest_tokens_per_second, kind.fastest_tokens_per_second
                assert slowest < speed < fastest and f"{slowest:,.0f} to {fastest:,.0f}" in text
            else:
                assert kind.slowest_tokens_per_second is kind.fastest_tokens_per_second is None
            hours = kind.training_seconds / 3600
            assert kind.energy_joules == pytest.approx(hours * card.watts * 3600)
            assert kind.training_seconds == pytest.approx(found.run.tokens / speed)
    fast, slow = (gpu.run.software[0].gains for gpu in found.gpus)
    assert [gain.recipe for gain in fast] == ["fp8", "nvfp4"] and slow == []
    assert all(1 < gain.speedup <= gain.largest_speedup for gain in fast)
    refused = document(capsys, "plan", "--gpu", "a100", "--dtype", "fp8").gpus[0]
    assert refused.run is None and "cannot train in fp8" in refused.obstacle


def test_plan_of_an_experiment_has_every_arm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.toml"
    text = SMALL_EXPERIMENT.format(seeds="1, 2").replace('dtype = "fp8"', 'dtype = "bfloat16"')
    text = text.replace('backend = "emulated"\n', "").replace("quantization_stats = true\n", "")
    file.write_text(text)
    found = document(capsys, "plan", file, "--gpu", "h100", "--software", "compiled")
    assert (found.run, found.experiment.seeds, found.experiment.scale) == (None, 2, None)
    arms = found.gpus[0].arms
    assert [arm.arm for arm in arms] == ["low", "high"] and arms[0].condition is None
    for arm in arms:
        assert arm.software == "compiled" and arm.obstacle is None
        tokens = arm.cost.training_seconds * arm.cost.tokens_per_second
        assert tokens == pytest.approx(5 * 4 * 16)
    file.write_text(SMALL_EXPERIMENT.format(seeds="1"))
    arm = document(capsys, "plan", file).gpus[0].arms[0]
    assert arm.cost is None and "emulated" in arm.obstacle


def test_plan_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("storylab.cli.verbs.plan.CALIBRATION_SECONDS", 0.0)
    small = "--preset nano --n_layer 1 --batch_size 2 --block_size 16 --vocab_size 300 --device cpu"
    found = document(capsys, "plan", *small.split(), "--gpu", "this")
    here = found.this_machine
    assert found.gpus == [] and here.micro_batch_seconds > 0 and here.peak_memory_bytes > 1e6
    assert here.tokens_per_second * here.training_seconds == pytest.approx(found.run.tokens)


def test_doctor_reports_speeds_and_faults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rate(rows: int, inner: int, columns: int, precision: ComputePolicy) -> float:
        if precision.dtype == torch.float16:
            raise RuntimeError("no float16 here")
        return 3e9 if precision.dtype == torch.bfloat16 else 1e9

    class Timer:
        def __init__(self, config: TrainConfig, vocab_size: int) -> None:
            if config.preset == "113m":
                raise torch.OutOfMemoryError("out of memory\nat 5 GB")
            self.block_size = config.block_size

        def median(self, sequences: int, seconds: float) -> float:
            return sequences * self.block_size / 1000

    monkeypatch.setattr("storylab.doctor.product_rate", rate)
    monkeypatch.setattr("storylab.doctor.StepTimer", Timer)
    flags = ["doctor", "--device", "cpu", "--presets", "nano", "113m"]
    found = document(capsys, *flags)
    assert [row.flops_per_second for row in found.products] == [1e9, 3e9, None]
    assert found.products[2].fault == "no float16 here" and found.recipes is None
    assert [row.tokens_per_second for row in found.training] == [1000.0, None]
    assert found.training[0].dtype == "bfloat16"
    assert found.training[1].fault == "out of memory" and found.training[1].other_cores is None
    assert found.machine.memory_bytes == psutil.virtual_memory().total
    assert (found.device, found.machine.torch) == ("cpu", torch.__version__)
    assert main(flags) == 0
    text = capsys.readouterr().out
    assert "3 GFLOP/s" in text and "float16   cannot run: no float16 here" in text
    assert "1,000 tok/s" in text and "113m  cannot run: out of memory" in text


@pytest.mark.parametrize(
    ("device", "gain", "expected"),
    [("cuda", 1.05, "bfloat16"), ("cuda", 1.2, "float16"), ("cpu", 1.05, "float16")],
)
def test_doctor_prefers_bfloat16_on_a_gpu(device: str, gain: float, expected: str) -> None:
    speeds = {"float32": 1e9, "bfloat16": 8e9, "float16": gain * 8e9}
    products = [
        ProductSpeed(dtype=dtype, flops_per_second=speed, other_cores=None, fault=None)
        for dtype, speed in speeds.items()
    ]
    assert fastest(products, torch.device(device)) == expected


@pytest.mark.slow
def test_doctor_reports_the_error_of_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "doctor", "--precision", "--device", "cpu")
    assert (found.products, found.training) == (None, None)
    assert [check.dtype for check in found.recipes] == list(RECIPES)
    for check in found.recipes:
        assert check.backend == "emulated" and check.fault is None
        assert [each.product for each in check.products] == list(PRODUCTS)
        assert all(each.fault is None and 0 < each.relative_error < 0.5 for each in check.products)


def test_noise_is_the_spread_of_the_losses(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (floor,) = document(capsys, "noise", runs / "a-s1").floors
    losses = [load_run(runs / name).loss for name in ("a-s1", "a-s2")]
    spread = floor.standard_deviation_nats_per_token
    assert spread == pytest.approx(np.std(losses, ddof=1)) and floor.seeds == 2
    assert floor.low_nats_per_token < spread < floor.high_nats_per_token
    assert (floor.condition, floor.level, floor.left_out) == (None, 0.95, [])
    assert [row.pairs for row in floor.detectable] == [3, 5, 10]
    sizes = [row.difference_nats_per_token for row in floor.detectable]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.slow
def test_training_on_the_way_is_reported_on_standard_error(
    dataset: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.toml"
    file.write_text(SMALL_EXPERIMENT.format(seeds="1, 2"))
    args = ["noise", str(file), "--seeds", "2", "--runs", str(tmp_path / "runs")]
    assert main([*args, "--data_dir", str(dataset.folder), "--json"]) == 0
    captured = capfd.readouterr()
    assert "Plan: Two rates" in captured.err
    (floor,) = msgspec.json.decode(captured.out, type=NoiseDocument).floors
    assert floor.seeds == 2


@pytest.mark.parametrize(
    "args",
    [
        ["list", "--runs", "nowhere"],
        ["plan", "nowhere.toml"],
        ["plan", "--gpu", "abacus"],
        ["eval", "nowhere"],
        ["info", "--n_head", "7"],
        ["doctor", "--device", "abacus"],
        ["noise", "nowhere"],
    ],
)
def test_an_error_prints_one_line_and_no_document(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*args, "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("storylab: ") and captured.err.count("\n") == 1


def test_remarks_do_not_reach_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    def make() -> ListDocument:
        print("a remark")
        return ListDocument(folder="\u2028\udcff", runs=[])

    print_document(make)
    captured = capsys.readouterr()
    assert captured.err == "a remark\n"
    assert json.loads(captured.out) == {
        "schema": "storylab.list/1",
        "folder": "\u2028?",
        "runs": [],
    }


def test_documents_load_neither_numpy_nor_torch() -> None:
    script = "import sys, storylab.documents; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", script], check=True)


def unit_in_name(unit: str) -> str:
    return unit.replace("FLOP", "flops").replace(" ", "_")


def test_every_field_has_a_meaning_and_its_unit_in_its_name() -> None:
    for kind in DOCUMENTS.values():
        for field in describe(kind):
            assert field.meaning, field
            name = field.path.rpartition(".")[2]
            assert name == "block_size" or unit_in_name(field.unit) in name, field


def test_a_field_without_a_meaning_is_refused() -> None:
    class Mute(msgspec.Struct, tag="mute/1"):
        loss: float

    class Odd(msgspec.Struct, tag="odd/1"):
        loss: Annotated[bytes, about("bytes are no JSON")]

    with pytest.raises(TypeError, match=r"Mute\.loss has no meaning"):
        describe(Mute)
    with pytest.raises(TypeError, match="no document may hold"):
        describe(Odd)


def sections() -> dict[str, Any]:
    """Every document, by the name in its schema."""
    return {
        describe(kind)[0].meaning[len("`storylab.") :].partition("/")[0]: kind
        for kind in DOCUMENTS.values()
    }


def table(name: str) -> str:
    """The fields of a document as a table of the guide."""
    rows = ["| field | type | unit | meaning |", "| --- | --- | --- | --- |"]
    for field in describe(sections()[name]):
        rows.append(f"| `{field.path}` | {field.type} | {field.unit} | {field.meaning} |")
    return "\n".join(rows) + "\n"


def with_tables(page: str) -> str:
    """The page with the tables of its documents as they should be."""
    head, *parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    names = [part.removeprefix("## ").partition("\n")[0] for part in parts]
    return head + "\n".join(f"## {name}\n\n{table(name)}" for name in names)


def field_lines() -> list[str]:
    """Every field with its type and unit, one a line."""
    return [
        " | ".join((schema.meaning.strip("`"), field.path, field.type, field.unit)).rstrip(" |")
        for kind in sections().values()
        for schema, *fields in [describe(kind)]
        for field in fields
    ]


def test_the_guide_lists_every_field() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == list(sections())
    assert page == with_tables(page), "run python tests/cli/test_json.py"


def test_no_field_of_a_version_has_changed() -> None:
    """A line of json_fields.txt is a promise: a changed field needs a new version of its document."""
    promised = FIELDS.read_text(encoding="utf-8").splitlines()
    assert set(promised) <= set(field_lines()), "a field was changed or removed: raise the version"
    assert set(promised) == set(field_lines()), (
        "fields were added: run python tests/cli/test_json.py"
    )


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    known = FIELDS.read_text(encoding="utf-8").splitlines() if FIELDS.exists() else []
    lines = [*known, *(line for line in field_lines() if line not in known)]
    FIELDS.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
